"""How many tokens go through a model at once on the device that it is on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dpo.config.schema import RunConfig
from dpo.errors import ModelError
from dpo.modeling.sharded import Scorer
from dpo.plan.job import FEW_TOKENS, GIB, Machine, tokens_at_once
from dpo.plan.sizes import from_config


def token_budget(config: RunConfig, model: Any, device: str) -> int:
    """``micro_batch_tokens``, or what it means where it is left out.

    Args:
        config: Settings of a stage.
        model: A causal language model of transformers, or the ``Scorer`` around one.
        device: ``cpu`` or ``cuda``.
    """
    if config.micro_batch_tokens is not None or device != "cuda":
        return config.micro_batch_tokens or FEW_TOKENS
    own = model.model if isinstance(model, Scorer) else model
    try:
        shape = from_config(own.config.to_dict())
    except ModelError:
        return FEW_TOKENS
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    gpus = dist.get_world_size() if dist.is_initialized() else 1
    return tokens_at_once(config, shape, Machine(gpus=gpus, gpu_memory_gib=memory / GIB))
