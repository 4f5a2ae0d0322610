"""Several processes that train one model: how they are arranged, and FSDP2.

Axes: E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.config.schema import RunConfig, TrainerConfig
from dpo.data.packing import PackedBatch
from dpo.distributed.heartbeat import arrived
from dpo.distributed.together import gather
from dpo.distributed.weights import take_from_first
from dpo.errors import ConfigError, ModelError
from dpo.modeling.precision import DTYPES
from dpo.modeling.scoring import token_log_probs

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which share of the examples this process takes.

    Processes that share each layer (tensor parallel) take the same examples and count as one.
    """

    rank: int = 0
    world: int = 1
    """Number of shares."""
    group: Any = None
    """Process group of those that have the other shares; None is all processes."""
    processes: int = 1
    """Number of all processes."""

    @classmethod
    def here(cls, layout: Layout | None = None) -> Ranks:
        """By the process group and the layout; one process where there is none."""
        if not dist.is_initialized():
            return cls()
        processes = dist.get_world_size()
        if layout is None or layout.tensor is None:
            return cls(dist.get_rank(), processes, None, processes)
        if layout.data is None:
            return cls(0, 1, None, processes)
        group = layout.data.get_group()
        return cls(layout.data.get_local_rank(), layout.data.size(), group, processes)

    def share(self, items: Sequence[T]) -> list[int]:
        """Indices of the items that this process takes: every ``world``-th."""
        return list(range(self.rank, len(items), self.world))

    def gather(self, value: T) -> list[T]:
        """The value of every share, in their order."""
        if self.world == 1:
            return [value]
        arrived()
        return gather(value, self.group)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(gather(flag)) if self.processes > 1 else flag


@dataclass(frozen=True)
class Layout:
    """How the processes are arranged.

    Attributes:
        data: Mesh of the processes that take different examples; one axis, or for hybrid sharding
            two: copies of the model, and the shards of each. None where all take the same.
        tensor: Mesh of those that share each layer; None without tensor parallelism.
    """

    data: DeviceMesh | None
    tensor: DeviceMesh | None = None

    @classmethod
    def of(cls, trainer: TrainerConfig, device: str) -> Layout:
        """The arrangement that the settings ask for.

        Raises:
            ConfigError: the number of processes does not come out.
        """
        world = dist.get_world_size()
        if trainer.name == "TensorParallelTrainer":
            size = trainer.tensor_parallel or world
            _divides(size, world, "trainer.tensor_parallel")
            if size == world:
                return cls(None, init_device_mesh(device, (world,), mesh_dim_names=("tensor",)))
            names = ("data", "tensor")
            mesh = init_device_mesh(device, (world // size, size), mesh_dim_names=names)
            return cls(mesh["data"], mesh["tensor"])
        if trainer.replicas == 1:
            return cls(init_device_mesh(device, (world,), mesh_dim_names=("shard",)))
        _divides(trainer.replicas, world, "trainer.replicas")
        shape = (trainer.replicas, world // trainer.replicas)
        return cls(init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard")))


def _divides(size: int, world: int, key: str) -> None:
    if world % size:
        possible = [str(n) for n in range(1, world + 1) if world % n == 0]
        raise ConfigError(
            f"{key} is {size}, which does not divide the {world} processes",
            where=key,
            fix=f"use one of {', '.join(possible)}, or another number of processes",
        )


class Scorer(nn.Module):
    """The whole forward pass of training as one module, which FSDP can wrap.

    Packed rows go through the base model and the output weights separately, so neither of them
    alone could be the root that gathers embeddings and output weights.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, dtype: torch.dtype, packed: bool | None = None) -> Tensor:
        """Log-probability of every response token of a row; float32, shape [N]."""
        return token_log_probs(self.model, batch, dtype=dtype, packed=packed)

    @property
    def device(self) -> torch.device:
        """Where its inputs have to be."""
        device: torch.device = self.model.device
        return device

    def generate(self, **arguments: Any) -> Any:
        """Sample from the model; every process has to, with the same prompts.

        Each gathers weights from all for each token, so a process that stayed away, or had other
        prompts and so another number of tokens, would keep the others waiting for ever.
        """
        return self.model.generate(**arguments)


def check_batch(config: RunConfig, ranks: Ranks) -> None:
    """The reference code's arithmetic: examples a process and micro-batch come out whole.

    Raises:
        ConfigError: ``batch_size`` is no multiple of accumulation steps times processes.
    """
    parts = config.gradient_accumulation_steps * ranks.world
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size ({config.batch_size}) must be a multiple of gradient_accumulation_steps "
            f"({config.gradient_accumulation_steps}) x processes ({ranks.world})",
            where="batch_size",
            fix=f"use a multiple of {parts}",
        )


def check_examples(n_examples: int, ranks: Ranks) -> None:
    """Refuse to start more processes than there are examples.

    Raises:
        ConfigError: some would have nothing to do.
    """
    if n_examples < ranks.world:
        raise ConfigError(
            f"{ranks.world} processes for {n_examples} training examples",
            where="number of processes",
            fix=f"start at most {n_examples} (DPO_PROCESSES), or train on more examples",
        )


def shard(
    scorer: Scorer, config: RunConfig, mesh: DeviceMesh, *, device: str | None = None
) -> Scorer:
    """FSDP2: each transformer block, then embeddings and output weights, spread over the mesh.

    With two axes a model is spread along the second and repeated along the first.

    Args:
        scorer: Around the model.
        config: Settings.
        mesh: The processes.
        device: Where each process is to hold its shard of the first process's weights, which are
            handed over block by block; None: every process has the weights where it wants them.

    Raises:
        ModelError: ``model.block_name`` names no class in the model.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    blocks = find_blocks(scorer.model, config.model.block_name)
    mixed = config.model.fsdp_policy_mp
    # gradients are summed in float32 whatever the products' type
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[mixed] if mixed else None, reduce_dtype=torch.float32
    )
    for block in blocks:
        if device:
            take_from_first(block, device)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if device:
        take_from_first(scorer, device)
    fully_shard(scorer, mesh=mesh, mp_policy=policy)
    # embeddings and output weights are gathered for the whole of it
    register_fsdp_forward_method(scorer, "generate")
    return scorer


def release(scorer: Any) -> None:
    """Give back what a forward pass without a backward pass has left gathered.

    Of the root FSDP keeps the whole weights after a forward pass. Whoever then asks for the model's
    parameters, an optimiser for example, gets those and not the shards that are trained.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(scorer, FSDPModule):
        scorer.reshard()


def find_blocks(model: Any, block_name: str | None) -> list[Any]:
    """The transformer blocks: modules of class ``block_name``, or those that the model declares.

    Raises:
        ModelError: there are none of that name.
    """
    names = {block_name} if block_name else set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found or not block_name:
        return found
    known = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
    raise ModelError(
        f"the model has no block {block_name}",
        where="model.block_name",
        fix=f"leave it out, or name one of {', '.join(known)}",
    )


def whole_weights(model: Any) -> dict[str, Tensor] | None:
    """All weights in the first process, gathered from the ranks; None where they are whole."""
    if not dist.is_initialized():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Tensor] = get_model_state_dict(model, options=options)
    # a tied weight is gathered under each of its names, and saved under one
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: weight for name, weight in weights.items() if tied.get(name) not in weights}
