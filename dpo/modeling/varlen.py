"""Attention of packed examples on a GPU: one call of torch's variable-length flash attention.

Queries of a row are its tokens in order: prompt with first response as one sequence, every further
response as one. Keys are gathered so that a further response's begin with its prompt. Both ends of
a sequence are aligned (bottom-right causal masks), so a response sees all of its prompt.

``tests/modeling/test_kernels.py`` compares the layout with dense masks on a CPU, and the kernel
with it where there is a GPU (seen on an H100).

Axes: H heads, G key/value heads, T tokens of the row, K gathered keys, S sequences,
D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.data.packing import Segment

Span = tuple[int, int]
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class VarlenLayout:
    """Which keys every sequence of queries sees, the last query all of them."""

    query_ends: tuple[int, ...]
    """One past the last query of each sequence; they follow each other."""
    key_ends: tuple[int, ...]
    """One past the last gathered key of each sequence."""
    keys: tuple[int, ...]
    """Token of the row that each gathered key is."""

    @property
    def longest(self) -> tuple[int, int]:
        """Most queries, and most keys, of a sequence."""
        queries = np.diff((0, *self.query_ends))
        return int(queries.max()), int(np.diff((0, *self.key_ends)).max())

    def sequences(self) -> list[tuple[Span, Span, Span | None]]:
        """Queries, gathered keys, and the tokens that these are where they stand together."""
        found: list[tuple[Span, Span, Span | None]] = []
        first_query = first_key = 0
        for last_query, last_key in zip(self.query_ends, self.key_ends, strict=True):
            queries, keys = (first_query, last_query), (first_key, last_key)
            together = last_query - first_query == last_key - first_key
            found.append((queries, keys, queries if together else None))
            first_query, first_key = last_query, last_key
        return found


def varlen_layout(segments: Sequence[Segment]) -> VarlenLayout:
    """The layout of a row."""
    query_ends: list[int] = []
    key_ends: list[int] = []
    keys: list[int] = []
    for segment in segments:
        first_end = segment.response_ends[0] if segment.response_ends else segment.prompt_end
        sequences = [[(segment.start, first_end)]]
        prompt = (segment.start, segment.prompt_end)
        sequences += [[prompt, own] for own in segment.response_spans[1:]]
        for spans in sequences:
            for first, last in spans:
                keys += range(first, last)
            query_ends.append(spans[-1][1])
            key_ends.append(len(keys))
    return VarlenLayout(tuple(query_ends), tuple(key_ends), tuple(keys))


@cache
def varlen_kernel() -> Any:
    """``varlen_attn``, or None where this torch has none that takes a window (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "scale"} <= _parameters(varlen_attn) else None


def _parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


@cache
def _for_grouped_heads() -> dict[str, bool]:
    """From 2.12 on the kernel wants to be told of fewer key/value heads; 2.11 takes them as is."""
    return {"enable_gqa": True} if "enable_gqa" in _parameters(varlen_kernel()) else {}


def takes_varlen(value_TGD: Tensor) -> bool:
    """Flash attention: a GPU of Ampere or newer, a type of 16 bits, and a size of heads it has."""
    device, head_size = value_TGD.device, value_TGD.shape[-1]
    if device.type != "cuda" or value_TGD.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = head_size % 8 == 0 and head_size <= _LARGEST_HEAD
    return fits and varlen_kernel() is not None and _has_flash_attention(device)


@cache
def _has_flash_attention(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    scale: float,
    layout: VarlenLayout,
    key_index_K: Tensor,
    query_ends_S: Tensor,
    key_ends_S: Tensor,
) -> Tensor:
    """Causal attention within each example; [T, H, D]."""
    result: Tensor = varlen_kernel()(
        query_THD.contiguous(),
        key_TGD.index_select(0, key_index_K),
        value_TGD.index_select(0, key_index_K),
        query_ends_S,
        key_ends_S,
        *layout.longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        **(_for_grouped_heads() if query_THD.shape[1] != key_TGD.shape[1] else {}),
    )
    return result
