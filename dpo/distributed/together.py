"""What the processes of one stage tell each other beside tensors; one process alone as well."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from dpo.distributed.heartbeat import arrived

T = TypeVar("T")
R = TypeVar("R")
_groups: dict[str, Any] = {}
_timeout: timedelta | None = None
_barriers = 0
_LONG = timedelta(days=1)
_WRITING = timedelta(minutes=30)
_POLL_SECONDS = 0.1


def connect(backend: str, timeout_seconds: float) -> None:
    """Join the processes of this job; none waits longer for another, but for the first to save."""
    global _timeout
    _timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, timeout=_timeout)


def waits_as_long(group: Any) -> None:
    """Let a group wait as long as that of all processes: torch gives a new one half an hour."""
    if _timeout is not None:
        dist.distributed_c10d._set_pg_timeout(_timeout, group)


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_first_of_host() -> bool:
    """Whether this is the process that moves files of this host."""
    return not dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"


def barrier() -> None:
    """Wait for all processes: for the first one, which reads and writes gigabytes, for a day.

    Whether it lives meanwhile the heartbeat says.
    """
    global _barriers
    if not dist.is_initialized():
        return
    arrived()
    _barriers += 1
    store, key = dist.distributed_c10d._get_default_store(), f"dpo/first/{_barriers}"
    if is_first():
        store.set(key, "here")
    else:
        end = time.monotonic() + _LONG.total_seconds()
        while not store.check([key]) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
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


def each_a_share(
    items: Sequence[T],
    do: Callable[[Sequence[T], range], Sequence[R]],
    *,
    at_once: int,
    advance: Callable[[int], object] | None = None,
) -> list[R]:
    """What ``do`` makes of all items, in their order, in every process; each does its share.

    Processes exchange what they have after ``at_once`` items of each: none waits long for another,
    however many items there are.

    Args:
        items: The same in every process.
        do: Given some of the items and their numbers, returns one result for each. One process
            alone is given all of them.
        at_once: Items of one process between two exchanges.
        advance: Told how many more are done; one process alone leaves that to ``do``.
    """
    if not dist.is_initialized():
        return list(do(items, range(len(items))))
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[R] = []
    for begin in range(0, len(items), at_once * world):
        end = min(len(items), begin + at_once * world)
        numbers = range(begin + rank, end, world)
        shares = gather(do([items[number] for number in numbers], numbers))
        found += [shares[n % world][n // world] for n in range(end - begin)]
        if advance:
            advance(end - begin)
    return found


def saving_group() -> Any:
    """A gloo group for what the first process says once it has sent gigabytes.

    It waits for a day; whether the first process lives meanwhile the heartbeat says.
    """
    return _group("sent", _LONG)


def writing_group() -> Any:
    """A gloo group for checkpoints: saving on that of the training aborts or hangs (torch 2.13).

    Each process writes its own part, so one that takes half an hour longer than another hangs.
    """
    return _group("written", _WRITING)


def _group(name: str, timeout: timedelta) -> Any:
    if dist.is_initialized() and name not in _groups:
        _groups[name] = dist.new_group(backend="gloo", timeout=timeout)
    return _groups.get(name)
