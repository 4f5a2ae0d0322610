"""Several processes that train one model: how they are arranged, and their shares.

Axes: E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.config.models import TrainerConfig
from dpo.config.schema import RunConfig
from dpo.distributed.heartbeat import arrived
from dpo.distributed.together import gather, waits_as_long
from dpo.errors import ConfigError
from dpo.plan import split

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
            split.check_divides(size, world, "trainer.tensor_parallel")
            if size == world:
                return cls(None, init_device_mesh(device, (world,), mesh_dim_names=("tensor",)))
            mesh = _mesh(device, data=world // size, tensor=size)
            return cls(mesh["data"], mesh["tensor"])
        if trainer.replicas == 1:
            return cls(init_device_mesh(device, (world,), mesh_dim_names=("shard",)))
        split.check_divides(trainer.replicas, world, "trainer.replicas")
        shards = world // trainer.replicas
        return cls(_mesh(device, replicate=trainer.replicas, shard=shards))


def _mesh(device: str, **sizes: int) -> DeviceMesh:
    """Of several axes, whose groups are new ones."""
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    for group in mesh.get_all_groups():
        waits_as_long(group)
    return mesh


def check_batch(config: RunConfig, ranks: Ranks) -> None:
    """The reference code's arithmetic: examples a process and micro-batch come out whole.

    Raises:
        ConfigError: ``batch_size`` is no multiple of accumulation steps times processes.
    """
    split.check_batch(config.batch_size, config.gradient_accumulation_steps, ranks.world)


def check_examples(n_examples: int, ranks: Ranks) -> None:
    """Refuse to start more processes than there are examples.

    Raises:
        ConfigError: some would have nothing to do.
    """
    if 0 < n_examples < ranks.world:
        raise ConfigError(
            f"{ranks.world} processes for {n_examples} training examples",
            where="number of processes",
            fix=f"start at most {n_examples} (DPO_PROCESSES), or train on more examples",
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
