"""Several processes that train one model: FSDP2, and what they have to agree on.

Axes: E examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo.config.schema import RunConfig
from dpo.data.packing import PackedBatch
from dpo.errors import ConfigError, ModelError
from dpo.modeling.precision import DTYPES
from dpo.modeling.scoring import token_log_probs

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of the processes this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """By the process group; one process where there is none."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[T]) -> list[int]:
        """Indices of the items that this process takes: every ``world``-th."""
        return list(range(self.rank, len(items), self.world))

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return any(self.gather(flag))


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


def shard(scorer: Scorer, config: RunConfig) -> Scorer:
    """FSDP2: each transformer block, then embeddings and output weights, spread over the ranks.

    Raises:
        ModelError: ``model.block_name`` names no class in the model.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks = find_blocks(scorer.model, config.model.block_name)
    mixed = config.model.fsdp_policy_mp
    # gradients are summed in float32 whatever the products' type
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[mixed] if mixed else None, reduce_dtype=torch.float32
    )
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(scorer, mp_policy=policy)
    return scorer


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
    return weights
