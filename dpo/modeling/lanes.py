"""Rows side by side on a CPU: each in a thread, with its share of the cores.

Between its matrix products a step consists of thousands of operations that are too small to be
split over cores, so that all but one core wait. With a row for each half of the cores nobody does:
12 to 20 % of a step's time on two cores, measured with SmolLM2. Every lane has gradients of its
own, which are added in a fixed order, so that the result does not depend on who is faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from dpo.data.tokenize import TokenizedExample
from dpo.modeling.kernels import is_compiled

T = TypeVar("T")
R = TypeVar("R")

_FEW = 12
"""Items that are dealt out in all ways: 2,048, in less than a millisecond."""

_MOST = 2
"""More lanes hold more gradients, and give little: each needs rows enough to be busy."""


def lanes_for(model: Any) -> int:
    """How many rows ``model`` is to work on at once; 1 on a GPU and among several processes."""
    if model.device.type != "cpu" or is_compiled(model) or torch.distributed.is_initialized():
        return 1
    return min(_MOST, torch.get_num_threads())


def side_by_side(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``work`` of every item, each in a thread of its own; results in the items' order.

    Modes that torch keeps for each thread (autocast, gradients off) are ``work``'s to set.
    """
    if len(items) == 1:
        return [work(items[0])]
    threads = torch.get_num_threads()
    each = max(1, threads // len(items))

    def with_its_share(item: T) -> R:
        torch.set_num_threads(each)
        return work(item)

    # first for this thread: new ones begin with what was set last
    torch.set_num_threads(each)
    try:
        futures = [_pool().submit(with_its_share, item) for item in items]
        # none goes on alone after another has failed
        wait(futures)
    finally:
        torch.set_num_threads(threads)
    return [future.result() for future in futures]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST, thread_name_prefix="lane")


def work_of(model: Any) -> Callable[[TokenizedExample], int]:
    """Says how much work an example is: a multiplication for each weight that a token meets.

    Every token goes through the blocks, and only those of responses through the output layer, which
    in small models is the larger part: counted by tokens alone, the busier of two lanes had 8 %
    more than its half with a 17 M model.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    blocks = sum(p.numel() for p in model.parameters() if id(p) not in tables)
    output = 0 if layers[1] is None else layers[1].weight.numel()
    return lambda example: example.n_tokens * blocks + output * sum(map(len, example.responses))


def balanced(work: Sequence[int], n_lanes: int) -> list[list[int]]:
    """Indices for each lane, ascending, so that the busiest has little more than the others.

    Few items are dealt to two lanes in the best of all ways; others the largest first, to the lane
    that has least.
    """
    if n_lanes == 2 and 0 < len(work) <= _FEW:
        # item 0 is always the first lane's
        first_WN = np.arange(2 ** (len(work) - 1))[:, None] * 2 + 1 >> np.arange(len(work)) & 1
        loads_W = first_WN @ np.array(work)
        best_N = first_WN[np.abs(2 * loads_W - sum(work)).argmin()]
        return [np.flatnonzero(best_N == in_first).tolist() for in_first in (1, 0)]
    lanes: list[list[int]] = [[] for _ in range(n_lanes)]
    loads = [0] * n_lanes
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        lane = loads.index(min(loads))
        lanes[lane].append(index)
        loads[lane] += work[index]
    return [sorted(lane) for lane in lanes]


def replica_of(model: Any) -> Any:
    """A second model on the same weights and buffers, with gradients of its own."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return copy.deepcopy(model, memo)


def has_weights_of(replica: Any, model: Any) -> bool:
    """Whether ``replica`` still is one of ``model``."""
    pairs = zip(replica.parameters(), model.parameters(), strict=True)
    return all(own.data_ptr() == weight.data_ptr() for own, weight in pairs)


def take_gradients(model: Any, replica: Any) -> None:
    """Add the gradients of ``replica`` to those of ``model``; it has none afterwards."""
    for weight, own in zip(model.parameters(), replica.parameters(), strict=True):
        if own.grad is None:
            continue
        if weight.grad is None:
            weight.grad = own.grad
        else:
            weight.grad += own.grad
        own.grad = None
