"""How many tokens go through a model at once on the device that it is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dpo.config.schema import RunConfig
from dpo.distributed.together import gather
from dpo.errors import ModelError
from dpo.modeling.precision import compute_dtype, name_of
from dpo.modeling.sharded import Scorer
from dpo.plan.job import FEW_TOKENS, GIB, Machine, tokens_at_once, tokens_to_score
from dpo.plan.shape import Architecture
from dpo.plan.sizes import from_config


def token_budget(config: RunConfig, model: Any, device: str) -> int:
    """``micro_batch_tokens`` of a training, or what it means where it is left out.

    The same in every process: those that share a layer pass the same rows.

    Args:
        config: Settings of a training stage.
        model: A causal language model of transformers.
        device: ``cpu`` or ``cuda``.
    """
    gpus = dist.get_world_size() if dist.is_initialized() else 1

    def chosen(shape: Architecture) -> int:
        return tokens_at_once(_settled(config, device), shape, _machine(gpus))

    return _budget(config, model, device, chosen)


def scoring_budget(config: RunConfig, model: Any, device: str) -> int:
    """Likewise for a step that trains nothing: it has no settings of training.

    Args:
        config: Settings of such a step.
        model: A causal language model of transformers, or the ``Scorer`` around one whose weights
            all processes share.
        device: ``cpu`` or ``cuda``.
    """
    together = isinstance(model, Scorer)
    own = model.model if together else model

    def chosen(shape: Architecture) -> int:
        return tokens_to_score(
            _settled(config, device),
            shape,
            _machine(1),
            dtype=name_of(next(own.parameters()).dtype),
            shards=dist.get_world_size() if together else 1,
        )

    return _budget(config, own, device, chosen)


def _budget(
    config: RunConfig, model: Any, device: str, chosen: Callable[[Architecture], int]
) -> int:
    if config.micro_batch_tokens is not None or device != "cuda":
        return config.micro_batch_tokens or FEW_TOKENS
    try:
        shape = from_config(model.config.to_dict())
    except ModelError:
        return FEW_TOKENS
    return min(gather(chosen(shape)))


def _settled(config: RunConfig, device: str) -> RunConfig:
    """With the type of products that this device has: an old GPU keeps twice as much of a token."""
    if compute_dtype(config.model, device) != torch.float32:
        return config
    model = config.model.model_copy(update={"compute_dtype": "float32"})
    return config.model_copy(update={"model": model})


def _machine(gpus: int) -> Machine:
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Machine(gpus=gpus, gpu_memory_gib=memory / GIB)
