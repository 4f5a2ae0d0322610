"""A model over several processes: read once, then whole on each device or in shards (FSDP2)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpo.config.models import ModelConfig
from dpo.data.packing import PackedBatch
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.together import agree, barrier, each_a_share, gather, is_first
from dpo.distributed.weights import outline, take_from_first
from dpo.modeling.attention import supports_packing
from dpo.modeling.blocks import find_blocks
from dpo.modeling.load import context_of
from dpo.modeling.precision import DTYPES
from dpo.modeling.scoring import NDArray, score, token_log_probs
from dpo.storage.progress import Bar

_SHARE_OF_MEMORY = 0.7
"""Of a device's, for a whole model: the rest is for activations and the cache of answers."""

_SHARE = 256
"""Examples that a process scores before the processes exchange what they have."""


class Scorer(nn.Module):
    """The whole forward pass of training as one module, which FSDP can wrap.

    Packed rows go through the base model and the output weights separately, so neither of them
    alone could be the root that gathers embeddings and output weights.

    Args:
        model: A causal language model of transformers.
        longest: Tokens of the longest sequence that any process will see, where several hold the
            model: all then take the same path for every row, and so as many passes as the others.
    """

    def __init__(self, model: Any, longest: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._packed = None if longest is None else supports_packing(model, longest)

    def forward(self, batch: PackedBatch, dtype: torch.dtype, packed: bool | None = None) -> Tensor:
        """Log-probability of every response token of a row; float32, shape [N]."""
        how = self._packed if packed is None else packed
        return token_log_probs(self.model, batch, dtype=dtype, packed=how)

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


def load_once(load: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    """Model and tokenizer; the first process alone has weights, on the CPU, the others none.

    Args:
        load: As ``load_for_training``, told where the weights are to be.
    """
    model, tokenizer = load(weights="cpu" if is_first() else "none")
    own = outline(model)
    barrier()
    if agree(own) != own:
        # a class that depends on its weights is loaded by all
        model, tokenizer = load(weights="cpu")
    return model, tokenizer


def on_devices(model: Any, settings: ModelConfig, device: str) -> Any:
    """What ``load_once`` loaded, for scoring and answering: whole on each process's device.

    Where a device is too small, a ``Scorer`` whose model all processes hold together.
    """
    if all(gather(fits(model, device))):
        take_from_first(model, device)
        return model
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("shard",))
    # products in the types of one process: autocast keeps no casts where there are no gradients
    settings = settings.model_copy(update={"fsdp_policy_mp": None})
    longest = context_of(model.config) or sys.maxsize
    return shard(Scorer(model, longest), settings, mesh, device=device)


def score_shared(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    dtype: torch.dtype,
    token_budget: int,
    bar: Bar | None = None,
) -> list[tuple[NDArray, ...]]:
    """``score`` over all processes, each with a share, of a model that ``on_devices`` gave."""
    own_bar = None if dist.is_initialized() else bar
    together: dict[str, Any] = {}
    if isinstance(model, Scorer) and examples:
        together = {"forward": model, "spare": examples[0]}

    def share(part: Sequence[TokenizedExample], _: range) -> list[tuple[NDArray, ...]]:
        return score(model, part, dtype=dtype, token_budget=token_budget, bar=own_bar, **together)

    advance = bar.advance if bar else None
    return each_a_share(examples, share, at_once=_SHARE, advance=advance)


def fits(model: Any, device: str) -> bool:
    """Whether each process's device can hold the whole model; processes share a host's CPU."""
    n_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if device == "cuda":
        memory: int = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return n_bytes <= _SHARE_OF_MEMORY * memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return n_bytes * dist.get_world_size() <= _SHARE_OF_MEMORY * host


def shard(
    scorer: Scorer, settings: ModelConfig, mesh: DeviceMesh, *, device: str | None = None
) -> Scorer:
    """FSDP2: each transformer block, then embeddings and output weights, spread over the mesh.

    With two axes a model is spread along the second and repeated along the first.

    Args:
        scorer: Around the model.
        settings: Of the model.
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

    blocks = find_blocks(scorer.model, settings.block_name)
    mixed = settings.fsdp_policy_mp
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
