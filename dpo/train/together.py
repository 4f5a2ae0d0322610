"""What the processes of one training tell each other beside tensors; one process alone as well."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch.distributed as dist

from dpo.train.heartbeat import arrived

T = TypeVar("T")
_saving: Any = None


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_first_of_host() -> bool:
    """Whether this is the process that moves files of this host."""
    return not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        arrived()
        dist.barrier()


def agree(value: T) -> T:
    """The first process's value, in every process."""
    if not dist.is_initialized():
        return value
    arrived()
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def gather(value: T, group: Any = None) -> list[T]:
    """The value of every process (of ``group``), in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    if group is None:
        arrived()
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def saving_group() -> Any:
    """A gloo group of its own: saving on the group of the training aborts or hangs (torch 2.13)."""
    global _saving
    if dist.is_initialized() and _saving is None:
        _saving = dist.new_group(backend="gloo")
    return _saving
