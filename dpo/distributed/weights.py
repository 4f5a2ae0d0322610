"""Weights that one process has read, handed to the others a part of the model at a time.

So a host reads and holds a model once, whatever the number of its processes, and no device ever
holds more than its shard and the part that is being spread.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def outline(model: nn.Module) -> str:
    """A hash of names, shapes and types of all weights and buffers, wherever they are."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    text = "\n".join(f"{name} {list(t.shape)} {t.dtype} {t.requires_grad}" for name, t in tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def take_from_first(module: nn.Module, device: str) -> None:
    """The first process's weights and buffers of ``module`` on ``device`` of every process.

    Every process has to call it, with modules of the same ``outline``; what the other processes
    hold is lost, so it may be on the meta device. What is sharded already stays as it is, and
    tied weights stay tied.
    """
    moved: dict[int, Tensor] = {}
    kept: list[Any] = []
    for owner in module.modules():
        for name, weight in owner._parameters.items():
            if weight is None or isinstance(weight, DTensor):
                continue
            if id(weight) not in moved:
                # an id means something while its tensor lives
                kept.append(weight)
                moved[id(weight)] = nn.Parameter(
                    _from_first(weight.detach(), device), requires_grad=weight.requires_grad
                )
            owner._parameters[name] = moved[id(weight)]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _from_first(buffer, device)


def _from_first(tensor: Tensor, device: str) -> Tensor:
    if dist.get_rank() == 0:
        found = tensor.to(device).contiguous()
    else:
        found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(found, src=0)
    return found
