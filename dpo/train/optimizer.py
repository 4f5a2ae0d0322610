"""Optimisers and the learning rate of each step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dpo.config.schema import RunConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: RunConfig
) -> torch.optim.Optimizer:
    """RMSprop with torch's defaults, as the reference code; or AdamW without weight decay."""
    if config.optimizer == "RMSprop":
        return torch.optim.RMSprop(parameters, lr=config.lr)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """The rate of optimiser step ``step`` (from 0).

    Warm-up as in the reference code, lr * min(1, (step + 1) / (warmup_steps + 1)); ``linear`` then
    falls so that it would reach 0 one step after the last.
    """
    factor = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "linear" and step >= config.warmup_steps:
        factor *= (total_steps - step) / max(1, total_steps - config.warmup_steps)
    return config.lr * factor
