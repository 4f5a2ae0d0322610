"""Attention of packed examples on a CPU: dense products per example, with a backward of our own.

``F.scaled_dot_product_attention`` reaches a quarter of a core's speed on sequences of some hundred
tokens, in bfloat16 less (its backward took 13 % of a step of SmolLM2). Here each part of an example
is a pair of batched products over heads: the prompt attends to itself, every response to the prompt
and itself. Queries and keys may come in before their rotation, which is then done here, part by
part in the cache. Grouped key/value heads are not repeated, and no slice's gradient is padded to a
row.

Scores and softmax are in float32 at least. Probabilities are kept for the backward pass, in the
type of the values: for SmolLM2 and 8 HH pairs 150 MB in bfloat16. Examples that are longer than
``LONGEST`` take the other path (``attention``).

Axes: H heads, G key/value heads, T tokens of the row, Q queries and K keys of one part (Q counts a
token once for each head that shares a key), S tokens of a span, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dpo.data.packing import Segment

LONGEST = 1024
"""Most tokens of an example: its probabilities are kept in memory."""
_QUERIES = 128
"""Tokens of a part: of the square of its own scores a half is computed in vain."""

Span = tuple[int, int]
Part = tuple[Span, tuple[Span, ...]]
"""Queries, and the spans of keys that they see; the last span is the queries' own."""


def parts_of(segments: Sequence[Segment]) -> list[Part]:
    """Prompts and responses of a row, in blocks of queries."""
    parts: list[Part] = []
    for segment in segments:
        prompt = (segment.start, segment.prompt_end)
        for own in (prompt, *segment.response_spans):
            for first in range(own[0], own[1], _QUERIES):
                block = (first, min(first + _QUERIES, own[1]))
                before = (() if own == prompt else (prompt,)) + ((own[0], first), block)
                parts.append((block, tuple(span for span in before if span[0] < span[1])))
    return parts


class SegmentAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V within each example; [T, H, D] and twice [T, G, D] to [T, H, D].

    With ``cos_TD`` and ``sin_TD`` the first values of each query and key are rotated before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        cos_TD: Tensor | None,
        sin_TD: Tensor | None,
        scale: float,
        parts: list[Part],
    ) -> Tensor:
        """Keeps the probabilities of each part."""
        n_groups, dtype = key_TGD.shape[1], value_TGD.dtype
        out_THD = torch.empty_like(query_THD, dtype=dtype, memory_format=torch.contiguous_format)
        rotation = _Rotation(cos_TD, sin_TD)
        key_GTD = rotation.forward(key_TGD, 0, len(key_TGD)).transpose(0, 1).contiguous()
        kept = []
        for (first, last), spans in parts:
            query_GQD = _heads_first(rotation.forward(query_THD, first, last) * scale, n_groups)
            scores = [query_GQD @ key_GTD[:, a:b].transpose(1, 2) for a, b in spans]
            scores_GQK = scores[0] if len(scores) == 1 else torch.cat(scores, dim=2)
            _hide_later(scores_GQK, last - first)
            probs_GQK = scores_GQK.softmax(-1).to(dtype)
            kept.append(probs_GQK)
            out_GQD = _times(probs_GQK, [value_TGD[a:b].transpose(0, 1) for a, b in spans])
            out_THD[first:last] = _tokens_first(out_GQD, query_THD.shape[1])
        ctx.save_for_backward(query_THD, key_TGD, value_TGD, cos_TD, sin_TD, *kept)
        ctx.scale, ctx.parts = scale, parts
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values before their rotation."""
        query_THD, key_TGD, value_TGD, cos_TD, sin_TD, *kept = ctx.saved_tensors
        (_, n_heads, _), n_groups, dtype = query_THD.shape, key_TGD.shape[1], value_TGD.dtype
        rotation = _Rotation(cos_TD, sin_TD)
        key_GTD = rotation.forward(key_TGD, 0, len(key_TGD)).to(dtype).transpose(0, 1).contiguous()
        shape = {"memory_format": torch.contiguous_format}
        grad_query_THD = torch.empty_like(query_THD, **shape)
        # summed over parts with heads first, as the products give them
        grad_key_GTD = torch.zeros_like(key_TGD.transpose(0, 1), dtype=dtype, **shape)
        grad_value_GTD = torch.zeros_like(value_TGD.transpose(0, 1), **shape)
        for ((first, last), spans), probs_GQK in zip(ctx.parts, kept, strict=True):
            grad_GQD = _heads_first(grad_THD[first:last], n_groups)
            query_THD_part = rotation.forward(query_THD, first, last) * ctx.scale
            query_GQD = _heads_first(query_THD_part.to(dtype), n_groups)
            values = [value_TGD[start:end].permute(1, 2, 0) for start, end in spans]
            grads = [grad_GQD @ value_GDS for value_GDS in values]
            grad_probs_GQK = grads[0] if len(grads) == 1 else torch.cat(grads, dim=2)
            grad_scores_GQK = torch._softmax_backward_data(grad_probs_GQK, probs_GQK, -1, dtype)
            for (start, end), part_GQS, probs_GQS in _by_span(spans, grad_scores_GQK, probs_GQK):
                grad_value_GTD[:, start:end].baddbmm_(probs_GQS.transpose(1, 2), grad_GQD)
                grad_key_GTD[:, start:end].baddbmm_(part_GQS.transpose(1, 2), query_GQD)
            grad_query_GQD = _times(grad_scores_GQK, [key_GTD[:, a:b] for a, b in spans])
            own_THD = _tokens_first(grad_query_GQD, n_heads).to(query_THD_part.dtype) * ctx.scale
            grad_query_THD[first:last] = rotation.backward(own_THD, first, last)
        grad_key_TGD = grad_key_GTD.transpose(0, 1)
        if cos_TD is not None:
            grad_key_TGD = rotation.backward(grad_key_TGD.to(cos_TD.dtype), 0, len(key_TGD))
        grad_value_TGD = grad_value_GTD.transpose(0, 1)
        return grad_query_THD, grad_key_TGD.to(key_TGD.dtype), grad_value_TGD, *[None] * 4


class _Rotation:
    """Rotary position embedding of the first values of each head, or none."""

    def __init__(self, cos_TD: Tensor | None, sin_TD: Tensor | None) -> None:
        self._cos_T1D = None if cos_TD is None else cos_TD[:, None]
        self._sin_T1D = None if sin_TD is None else sin_TD[:, None]

    def forward(self, values_THD: Tensor, first: int, last: int) -> Tensor:
        """x cos + (-x2, x1) sin, in the type of the cosines."""
        return self._turned(values_THD[first:last], first, last, 1.0)

    def backward(self, grad_THD: Tensor, first: int, last: int) -> Tensor:
        """Its transpose: the rotation the other way, for gradients of tokens ``first`` on."""
        return self._turned(grad_THD, first, last, -1.0)

    def _turned(self, values_SHD: Tensor, first: int, last: int, way: float) -> Tensor:
        if self._cos_T1D is None or self._sin_T1D is None:
            wide = torch.promote_types(values_SHD.dtype, torch.float32)
            return values_SHD.to(wide)
        cos_S1D, sin_S1D = self._cos_T1D[first:last], self._sin_T1D[first:last]
        half = cos_S1D.shape[2] // 2
        low_SHD, high_SHD = values_SHD[..., :half], values_SHD[..., half : 2 * half]
        out_SHD = torch.empty_like(
            values_SHD, dtype=cos_S1D.dtype, memory_format=torch.contiguous_format
        )
        torch.mul(values_SHD[..., : 2 * half], cos_S1D, out=out_SHD[..., : 2 * half])
        out_SHD[..., :half].addcmul_(high_SHD, sin_S1D[..., :half], value=-way)
        out_SHD[..., half : 2 * half].addcmul_(low_SHD, sin_S1D[..., half:], value=way)
        out_SHD[..., 2 * half :] = values_SHD[..., 2 * half :]
        return out_SHD


def _heads_first(values_SHD: Tensor, n_groups: int) -> Tensor:
    """The heads that share a key as one longer list of queries: [G, Q, D]."""
    n_tokens, n_heads, head_size = values_SHD.shape
    return values_SHD.transpose(0, 1).reshape(n_groups, n_heads // n_groups * n_tokens, head_size)


def _tokens_first(values_GQD: Tensor, n_heads: int) -> Tensor:
    return values_GQD.reshape(n_heads, -1, values_GQD.shape[2]).transpose(0, 1)


def _hide_later(scores_GQK: Tensor, n_own: int) -> None:
    """Among its own tokens a query sees none that comes later."""
    own = scores_GQK.view(len(scores_GQK), -1, n_own, scores_GQK.shape[2])[..., -n_own:]
    own += _later(n_own, own.dtype)


@lru_cache(maxsize=256)
def _later(n: int, dtype: torch.dtype) -> Tensor:
    return torch.full((n, n), float("-inf"), dtype=dtype).triu_(1)


def _by_span(spans: tuple[Span, ...], *values_GQK: Tensor) -> list[tuple[Span, Tensor, Tensor]]:
    """Each span with its columns."""
    found, at = [], 0
    for start, end in spans:
        first, second = (values[..., at : at + end - start] for values in values_GQK)
        found.append(((start, end), first, second))
        at += end - start
    return found


def _times(weights_GQK: Tensor, spans_GSD: list[Tensor]) -> Tensor:
    """Sum over the spans of weights times values; [G, Q, D]."""
    at = spans_GSD[0].shape[1]
    total_GQD = weights_GQK[..., :at] @ spans_GSD[0]
    for values_GSD in spans_GSD[1:]:
        end = at + values_GSD.shape[1]
        total_GQD.baddbmm_(weights_GQK[..., at:end], values_GSD)
        at = end
    return total_GQD
