"""Attention over packed rows in which the responses of an example share its prompt.

Registered with transformers under ``NAME``; transformers builds no mask for a name that it does not
know, which is what is wanted: the layout of the row, handed through the model's keyword arguments,
says who attends to whom. Each example is attended to by itself, so no mask of a whole row exists.

Axes: B = 1 row, H heads, T tokens, D head size; G key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.data.packing import Segment
from dpo.modeling.segments import LONGEST, SegmentAttention, parts_of

NAME = "dpo_prefix_shared"
ARCHITECTURES = (
    *("gpt_neox", "llama", "gpt2", "mistral"),
    *("qwen2", "qwen3", "gemma", "olmo2", "phi", "phi3", "opt"),
)
"""``model_type`` of the models that this is tested with; others take the plain path (``plain``).
GPT-J is one of them: it does not look into transformers' registry of attentions."""


def prefix_shared_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,  # none is built for this attention
    scaling: float | None = None,
    dropout: float = 0.0,  # models are loaded with all dropouts at 0
    *,
    segments: Sequence[Segment],
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; output [B, T, H, D] as transformers wants it."""
    if takes_own_products(query_BHTD.device, segments):
        return _by_own_products(query_BHTD, key_BGTD, value_BGTD, scaling, segments), None
    groups = query_BHTD.shape[1] // key_BGTD.shape[1]
    if groups > 1:
        key_BGTD = key_BGTD.repeat_interleave(groups, dim=1)
        value_BGTD = value_BGTD.repeat_interleave(groups, dim=1)
    parts = []
    for segment in segments:
        start, prompt_end = segment.start, segment.prompt_end
        for number, (first, last) in enumerate(segment.response_spans):
            if number == 0:
                # the prompt and its first response are one causal sequence
                whole = slice(start, last)
                parts.append(
                    F.scaled_dot_product_attention(
                        query_BHTD[:, :, whole],
                        key_BGTD[:, :, whole],
                        value_BGTD[:, :, whole],
                        is_causal=True,
                        scale=scaling,
                    )
                )
                continue
            own = slice(first, last)
            key = torch.cat((key_BGTD[:, :, start:prompt_end], key_BGTD[:, :, own]), dim=2)
            value = torch.cat((value_BGTD[:, :, start:prompt_end], value_BGTD[:, :, own]), dim=2)
            parts.append(
                F.scaled_dot_product_attention(
                    query_BHTD[:, :, own],
                    key,
                    value,
                    attn_mask=_bottom_right(last - first, key.shape[2], query_BHTD.device),
                    scale=scaling,
                )
            )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def takes_own_products(device: torch.device, segments: Sequence[Segment]) -> bool:
    """Whether a row is attended to by ``segments.SegmentAttention``."""
    longest = max(segment.response_ends[-1] - segment.start for segment in segments)
    return device.type == "cpu" and longest <= LONGEST


def _by_own_products(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    scaling: float | None,
    segments: Sequence[Segment],
) -> Tensor:
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    tokens_first = (x_BHTD[0].transpose(0, 1) for x_BHTD in (query_BHTD, key_BGTD, value_BGTD))
    with torch.autocast(query_BHTD.device.type, enabled=False):
        out_THD: Tensor = SegmentAttention.apply(
            *tokens_first, None, None, scale, parts_of(segments)
        )
    return out_THD[None]


def _bottom_right(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Causal mask in which the last query sees every key."""
    full = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return full.tril(diagonal=n_keys - n_queries)


def register() -> None:
    """Make the attention known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, prefix_shared_attention)


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Let ``model`` attend over packed rows while the block runs."""
    register()
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def supports_packing(config: Any, longest: int) -> bool:
    """Whether a model with ``config`` takes packed rows with sequences up to ``longest``."""
    if config.model_type not in ARCHITECTURES:
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or longest <= window
