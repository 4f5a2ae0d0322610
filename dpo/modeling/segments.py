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

from dpo.data.packing import PackedBatch, Segment

_KEPT = "_dpo_parts"
LONGEST = 1024
"""Most tokens of an example: its probabilities are kept in memory."""
_QUERIES = 128
"""Tokens of a part: of the square of its own scores a half is computed in vain."""

Span = tuple[int, int]
Part = tuple[Span, tuple[Span, ...]]
"""Queries, and the spans of keys that they see; the queries are the last tokens of the last."""


def parts_of_row(row: PackedBatch) -> list[Part]:
    """``parts_of`` its segments; made once, for every layer and pass asks for them."""
    if _KEPT not in row.__dict__:
        row.__dict__[_KEPT] = parts_of(row.segments)
    kept: list[Part] = row.__dict__[_KEPT]
    return kept


def parts_of(segments: Sequence[Segment]) -> list[Part]:
    """Prompts and responses of a row, in blocks of queries."""
    parts: list[Part] = []
    for segment in segments:
        prompt = (segment.start, segment.prompt_end)
        for own in (prompt, *segment.response_spans):
            for first in range(own[0], own[1], _QUERIES):
                block = (first, min(first + _QUERIES, own[1]))
                before = [] if own == prompt else [prompt]
                spans = _joined([*before, (own[0], block[1])])
                parts.append((block, spans))
    return parts


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    """Without empty spans, and neighbours as one: each costs a call of every product."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif start < end:
            joined.append((start, end))
    return tuple(joined)


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
        """Keeps what the backward pass multiplies: rotated queries and keys, and probabilities."""
        n_groups, dtype = key_TGD.shape[1], value_TGD.dtype
        out_THD = torch.empty_like(query_THD, dtype=dtype, memory_format=torch.contiguous_format)
        rotation = _Rotation(cos_TD, sin_TD)
        scaled = rotation.times(scale)
        key_GTD = rotation.forward(key_TGD, 0, len(key_TGD))
        value_GTD = value_TGD.transpose(0, 1)
        queries, probs = [], []
        for (first, last), spans in parts:
            query_GQD = scaled.forward(query_THD, first, last).view(n_groups, -1, key_GTD.shape[2])
            scores_GQK = query_GQD @ _gathered(key_GTD, spans).transpose(1, 2)
            _hide_later(scores_GQK, last - first)
            probs_GQK = scores_GQK.softmax(-1).to(dtype)
            queries.append(query_GQD.to(dtype))
            probs.append(probs_GQK)
            out_GQD = probs_GQK @ _gathered(value_GTD, spans)
            out_THD[first:last] = _tokens_first(out_GQD, query_THD.shape[1])
        kept = (key_GTD.to(dtype), value_TGD, cos_TD, sin_TD)
        ctx.save_for_backward(*kept, *queries, *probs)
        ctx.scale, ctx.parts = scale, parts
        ctx.dtypes = query_THD.dtype, key_TGD.dtype
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values before their rotation."""
        key_GTD, value_TGD, cos_TD, sin_TD, *kept = ctx.saved_tensors
        n_groups, n_tokens, head_size = key_GTD.shape
        n_heads = grad_THD.shape[1]
        value_GDT = value_TGD.permute(1, 2, 0)
        # heads first, as the products give them
        grad_query_HTD = grad_THD.new_empty(n_heads, n_tokens, head_size)
        grad_key_GTD, grad_value_GTD = torch.zeros_like(key_GTD), torch.zeros_like(key_GTD)
        queries, probs = kept[: len(ctx.parts)], kept[len(ctx.parts) :]
        for ((first, last), spans), query_GQD, probs_GQK in zip(
            ctx.parts, queries, probs, strict=True
        ):
            grad_GQD = _heads_first(grad_THD[first:last], n_groups)
            grad_probs_GQK = grad_GQD @ _gathered(value_GDT, spans, dim=2)
            grad_scores_GQK = torch._softmax_backward_data(
                grad_probs_GQK, probs_GQK, -1, grad_probs_GQK.dtype
            )
            _add_product(grad_value_GTD, spans, probs_GQK, grad_GQD)
            _add_product(grad_key_GTD, spans, grad_scores_GQK, query_GQD)
            own_GQD = grad_scores_GQK @ _gathered(key_GTD, spans)
            grad_query_HTD[:, first:last] = own_GQD.view(n_heads, -1, head_size)
        rotation = _Rotation(cos_TD, sin_TD)
        query_type, key_type = ctx.dtypes
        grad_query_THD = rotation.times(ctx.scale).backward(grad_query_HTD, query_type)
        grad_key_TGD = rotation.backward(grad_key_GTD, key_type)
        return grad_query_THD, grad_key_TGD, grad_value_GTD.transpose(0, 1), *[None] * 4


class _Rotation:
    """Rotary position embedding of the first values of each head, or none, times a factor."""

    def __init__(self, cos_TD: Tensor | None, sin_TD: Tensor | None, factor: float = 1.0) -> None:
        self._cos_TD, self._sin_TD = cos_TD, sin_TD
        self._factor = factor

    def times(self, factor: float) -> _Rotation:
        """The same, times ``factor``."""
        if self._cos_TD is None or self._sin_TD is None:
            return _Rotation(None, None, factor)
        return _Rotation(self._cos_TD * factor, self._sin_TD * factor, factor)

    def forward(self, values_THD: Tensor, first: int, last: int) -> Tensor:
        """x cos + (-x2, x1) sin of tokens ``first`` on; [H, S, D], in float32 at least."""
        values_HSD = values_THD[first:last].transpose(0, 1)
        wide = torch.promote_types(values_HSD.dtype, torch.float32)
        out_HSD = torch.empty(values_HSD.shape, dtype=wide, device=values_HSD.device)
        return self._turned(values_HSD, out_HSD, first, last, 1.0)

    def backward(self, grad_HTD: Tensor, dtype: torch.dtype) -> Tensor:
        """The transpose, the rotation the other way; [T, H, D] in ``dtype``."""
        wide = torch.promote_types(grad_HTD.dtype, torch.float32)
        shape = grad_HTD.transpose(0, 1).shape
        grad_THD = torch.empty(shape, dtype=wide, device=grad_HTD.device)
        self._turned(grad_HTD, grad_THD.transpose(0, 1), 0, grad_HTD.shape[1], -1.0)
        return grad_THD.to(dtype)

    def _turned(
        self, values_HSD: Tensor, out_HSD: Tensor, first: int, last: int, way: float
    ) -> Tensor:
        if self._cos_TD is None or self._sin_TD is None:
            return torch.mul(values_HSD, self._factor, out=out_HSD)
        cos_SD, sin_SD = self._cos_TD[first:last], self._sin_TD[first:last]
        half = cos_SD.shape[1] // 2
        low_HSD, high_HSD = values_HSD[..., :half], values_HSD[..., half : 2 * half]
        torch.mul(values_HSD[..., : 2 * half], cos_SD, out=out_HSD[..., : 2 * half])
        out_HSD[..., :half].addcmul_(high_HSD, sin_SD[:, :half], value=-way)
        out_HSD[..., half : 2 * half].addcmul_(low_HSD, sin_SD[:, half:], value=way)
        if out_HSD.shape[2] > 2 * half:
            torch.mul(values_HSD[..., 2 * half :], self._factor, out=out_HSD[..., 2 * half :])
        return out_HSD


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


def _gathered(values: Tensor, spans: tuple[Span, ...], dim: int = 1) -> Tensor:
    """The tokens of ``spans`` side by side: one product costs less than one for each span."""
    pieces = [values.narrow(dim, start, end - start) for start, end in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _add_product(
    total_GTD: Tensor, spans: tuple[Span, ...], weights_GQK: Tensor, values_GQD: Tensor
) -> None:
    """Add weights^T values to the tokens of ``spans``."""
    weights_GKQ = weights_GQK.transpose(1, 2)
    if len(spans) == 1:
        ((start, end),) = spans
        total_GTD[:, start:end].baddbmm_(weights_GKQ, values_GQD)
        return
    product_GKD, at = weights_GKQ @ values_GQD, 0
    for start, end in spans:
        total_GTD[:, start:end] += product_GKD[:, at : at + end - start]
        at += end - start
