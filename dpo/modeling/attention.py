"""Attention over packed rows in which the responses of an example share its prompt.

Registered with transformers under ``NAME``; transformers builds no mask for a name that it does not
know, which is what is wanted: the layout of the row, handed through the model's keyword arguments,
says who attends to whom. Each example is attended to by itself, so no mask of a whole row exists.

On a CPU by products of our own (``segments``), on a GPU by variable-length flash attention
(``varlen``), else by torch's attention, one call for each sequence.

Axes: B = 1 row, H heads, T tokens, D head size; G key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.data.packing import PackedBatch, Segment
from dpo.modeling.rows import RowTensors, row_tensors
from dpo.modeling.segments import LONGEST, SegmentAttention, parts_of_row
from dpo.modeling.varlen import takes_varlen, varlen_attention

NAME = "dpo_prefix_shared"
ARCHITECTURES = (
    *("gpt_neox", "llama", "gpt2", "mistral"),
    *("qwen2", "qwen3", "gemma", "olmo2", "phi", "phi3", "opt"),
)
"""``model_type`` of the models that this is tested with; others take the plain path (``plain``).
GPT-J is one of them: it does not look into transformers' registry of attentions."""


@torch.compiler.disable
def prefix_shared_attention(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,  # none is built for this attention
    scaling: float | None = None,
    dropout: float = 0.0,  # models are loaded with all dropouts at 0
    *,
    row: PackedBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example; output [B, T, H, D] as transformers wants it."""
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    if takes_own_products(query_BHTD.device, row.segments):
        return _by_own_products(query_BHTD, key_BGTD, value_BGTD, scale, row), None
    query_THD, key_TGD, value_TGD = (
        x_BHTD[0].transpose(0, 1) for x_BHTD in (query_BHTD, key_BGTD, value_BGTD)
    )
    return attend(query_THD, key_TGD, value_TGD, scale, row)[None], None


def attend(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float, row: PackedBatch
) -> Tensor:
    """Causal attention within each example by torch's kernels; [T, H, D]."""
    sent = row_tensors(row, query_THD.device)
    if takes_varlen(value_TGD):
        # rotation leaves queries and keys in float32 under autocast
        query_THD, key_TGD = query_THD.to(value_TGD.dtype), key_TGD.to(value_TGD.dtype)
        tensors = (sent.key_index_K, sent.query_ends_S, sent.key_ends_S)
        return varlen_attention(query_THD, key_TGD, value_TGD, scale, sent.layout, *tensors)
    return _by_sdpa(query_THD, key_TGD, value_TGD, scale, sent)


def _by_sdpa(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float, sent: RowTensors
) -> Tensor:
    """One call for each sequence of ``varlen.VarlenLayout``."""
    groups = query_THD.shape[1] // key_TGD.shape[1]
    if groups > 1:
        key_TGD = key_TGD.repeat_interleave(groups, dim=1)
        value_TGD = value_TGD.repeat_interleave(groups, dim=1)
    parts = []
    for queries, keys, index in sent.layout.sequences():
        n_queries, n_keys = queries[1] - queries[0], keys[1] - keys[0]
        # a prompt with its first response stands together; a later response is gathered
        own = sent.key_index_K[slice(*keys)] if index is None else slice(*index)
        mask = None if n_queries == n_keys else _bottom_right(n_queries, n_keys, sent.slot_N.device)
        part_BHTD = F.scaled_dot_product_attention(
            query_THD[slice(*queries)].transpose(0, 1)[None],
            key_TGD[own].transpose(0, 1)[None],
            value_TGD[own].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        parts.append(part_BHTD[0].transpose(0, 1))
    return torch.cat(parts)


def takes_own_products(device: torch.device, segments: Sequence[Segment]) -> bool:
    """Whether a row is attended to by ``segments.SegmentAttention``."""
    longest = max(max((s.prompt_end, *s.response_ends)) - s.start for s in segments)
    return device.type == "cpu" and longest <= LONGEST


def _by_own_products(
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    scale: float,
    row: PackedBatch,
) -> Tensor:
    tokens_first = (x_BHTD[0].transpose(0, 1) for x_BHTD in (query_BHTD, key_BGTD, value_BGTD))
    with torch.autocast(query_BHTD.device.type, enabled=False):
        out_THD: Tensor = SegmentAttention.apply(
            *tokens_first, None, None, scale, parts_of_row(row)
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


def same_rotation_up_to(config: Any) -> float:
    """The longest sequence whose rotary positions do not depend on those beside it; infinity else.

    LongRoPE (https://arxiv.org/abs/2402.13753, section 3.3) has other factors for sequences beyond
    the length of pretraining, and transformers chooses them by the longest in a batch, for all.
    """
    given = getattr(config, "rope_parameters", None) or {}
    each = [given, *(value for value in given.values() if isinstance(value, dict))]
    limits = [
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for rope in each
        if rope.get("rope_type") == "longrope"
    ]
    return min((limit for limit in limits if limit), default=float("inf"))


def is_known(module: Any) -> bool:
    """Whether the code of ``module`` is transformers' own: code that comes with a model may bear
    the names of a known architecture and do otherwise."""
    return type(module).__module__.startswith("transformers.models.")


def supports_packing(model: Any, longest: int) -> bool:
    """Whether ``model`` takes packed rows with sequences up to ``longest``."""
    config = model.config
    if config.model_type not in ARCHITECTURES or not is_known(model):
        return False
    if longest > same_rotation_up_to(config):
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or longest <= window
