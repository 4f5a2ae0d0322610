"""Reads the sizes of a model from its ``config.json``, whatever its kind calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.errors import ModelError
from dpo.plan.kinds import Kind, is_set, kind_of
from dpo.plan.shape import Architecture, Experts, Matrices

_NAMES = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_topk", "moe_k", "experts_per_token"),
    "shared_expert_intermediate_size": ("shared_intermediate_size",),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts"),
}
"""Other names of a size."""


class _Sizes:
    """The whole numbers of a config.json."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.kind_name = str(values.get("model_type", ""))

    def __call__(self, name: str, default: int | None = None) -> int:
        """The number called ``name``, or what another kind calls so.

        Raises:
            ModelError: it has no default, and is not there or below 1.
        """
        for key in (name, *_NAMES.get(name, ())):
            found = self.values.get(key)
            if isinstance(found, int) and not isinstance(found, bool):
                if default is None and found < 1:
                    raise self._error(f"has {key} {found}")
                return found
        if default is None:
            raise self._error(f"has no {name}")
        return default

    def _error(self, problem: str) -> ModelError:
        return ModelError(
            f"the model's configuration {problem}",
            where=f"model_type {self.kind_name or 'missing'}",
            fix="`dpo plan` knows decoder-only models of transformers whose blocks have "
            "attention; give another model",
        )


def from_config(values: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` of transformers describes.

    Raises:
        ModelError: it lacks a size.
    """
    size = _Sizes(values)
    kind, known = kind_of(values)
    width, n_heads = size("hidden_size"), size("num_attention_heads")
    n_kv_heads = _kv_heads(size, n_heads)
    head_size = size("head_dim", size("kv_channels", width // n_heads))
    if kind.latent:
        # queries and keys have another size than values: their mean takes part in attention
        head_size = (_latent_sizes(size)[0] + size("v_head_dim", 128)) // 2
    mlp_width = size("intermediate_size", size("expansion_ratio", 4) * width)
    experts = _experts(size, kind, mlp_width)
    attention = _attention(size, kind, (n_heads, n_kv_heads, head_size))
    passed = mlp_width if experts is None else _passed_width(experts)
    return Architecture(
        model_type=size.kind_name,
        n_layers=size("num_hidden_layers"),
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=head_size,
        mlp_width=passed,
        gated=kind.gated,
        vocabulary=size("vocab_size"),
        context=_context(values),
        attention=attention,
        mlp=_mlp(kind, width, mlp_width),
        vectors=_vectors(size, kind, (n_heads, n_kv_heads, head_size), mlp_width),
        embedding_parameters=_embeddings(size, kind),
        experts=experts,
        known=known,
    )


def _context(values: Mapping[str, Any]) -> int:
    # as training takes it: Bloom's seq_length is no limit
    found = (values.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in found if isinstance(value, int)), 0)


def _kv_heads(size: _Sizes, n_heads: int) -> int:
    values = size.values
    if size.kind_name == "falcon" and not values.get("new_decoder_architecture"):
        return 1 if values.get("multi_query", True) else n_heads
    if size.kind_name == "gpt_bigcode":
        return 1 if values.get("multi_query", True) else n_heads
    return size("num_key_value_heads", size("num_kv_heads", n_heads))


def _latent_sizes(size: _Sizes) -> tuple[int, int, int]:
    """Of a query's head in all, of what of it turns with the position, of the common vector."""
    turned = size("qk_rope_head_dim", 64)
    return size("qk_nope_head_dim", 128) + turned, turned, size("kv_lora_rank", 512)


def _attention(size: _Sizes, kind: Kind, heads: tuple[int, int, int]) -> Matrices:
    n_heads, n_kv_heads, head_size = heads
    width, queries, keys = size("hidden_size"), n_heads * head_size, n_kv_heads * head_size
    if not kind.latent:
        if kind.fused:
            return ((width, queries + 2 * keys), (queries, width))
        return ((width, queries), (width, keys), (width, keys), (queries, width))
    each, turned, common = _latent_sizes(size)
    value = size("v_head_dim", 128)
    rank = size("q_lora_rank", 0)
    query: Matrices = ((width, n_heads * each),)
    if rank:
        query = ((width, rank), (rank, n_heads * each))
    keys_and_values = (common, n_heads * (each - turned + value))
    return (*query, (width, common + turned), keys_and_values, (n_heads * value, width))


def _mlp(kind: Kind, width: int, mlp_width: int) -> Matrices:
    if not kind.gated:
        return ((width, mlp_width), (mlp_width, width))
    if kind.fused_gate:
        return ((width, 2 * mlp_width), (mlp_width, width))
    return ((width, mlp_width), (width, mlp_width), (mlp_width, width))


def _experts(size: _Sizes, kind: Kind, mlp_width: int) -> Experts | None:
    count = size("num_experts", 0)
    if count < 2:
        return None
    width, each = size("hidden_size"), size("moe_intermediate_size", mlp_width)
    shared = size("shared_expert_intermediate_size", size("n_shared_experts", 0) * each)
    always: Matrices = ((width, count),)
    if shared:
        always += _mlp(kind, width, shared)
    if size.kind_name == "qwen2_moe":
        # a gate of the shared expert
        always += ((width, 1),)
    n_blocks = _expert_blocks(size)
    # where other MLPs have the names by which peft knows experts
    others = len(always) > 1 or n_blocks < size("num_hidden_layers")
    adapted = others and (kind.latent or size.kind_name in ("qwen3_moe", "glm4_moe"))
    has_biases = is_set(kind.mlp_bias, size.values)
    return Experts(
        each=_mlp(kind, width, each),
        biases=has_biases * ((2 if kind.gated else 1) * each + width),
        count=count,
        active=min(count, size("num_experts_per_tok", 2)),
        shared=always,
        n_blocks=n_blocks,
        adapted=adapted,
    )


def _expert_blocks(size: _Sizes) -> int:
    n_layers = size("num_hidden_layers")
    step = max(1, size("decoder_sparse_step", 1))
    named = size.values.get("mlp_only_layers")
    plain = named if isinstance(named, list) else []
    first = size("first_k_dense_replace", 0)
    return sum(
        (layer + 1) % step == 0 and layer not in plain and layer >= first
        for layer in range(n_layers)
    )


def _passed_width(experts: Experts) -> int:
    """Of the MLPs that a token passes in a block with experts, together."""
    shared = experts.shared[-1][0] if len(experts.shared) > 2 else 0
    return experts.active * experts.each[-1][0] + shared


def _vectors(size: _Sizes, kind: Kind, heads: tuple[int, int, int], mlp_width: int) -> int:
    n_heads, n_kv_heads, head_size = heads
    width, queries, keys = size("hidden_size"), n_heads * head_size, n_kv_heads * head_size
    found = _norms(size, kind) * width * (2 if kind.norm_bias else 1)
    found += is_set(kind.qkv_bias, size.values) * (queries + 2 * keys)
    found += is_set(kind.out_bias, size.values) * width
    found += {"": 0, "each": 2 * head_size, "whole": queries + keys}[kind.head_norms]
    if kind.latent:
        found += size("kv_lora_rank", 512) + size("q_lora_rank", 0)
    if is_set(kind.mlp_bias, size.values) and size("num_experts", 0) < 2:
        found += (2 if kind.gated else 1) * mlp_width + width
    return found


def _norms(size: _Sizes, kind: Kind) -> int:
    """How many a block has over the hidden size."""
    values = size.values
    if size.kind_name == "falcon":
        if values.get("new_decoder_architecture"):
            return 1 if values.get("num_ln_in_parallel_attn") == 1 else 2
        return 1 if values.get("parallel_attn", True) else 2
    if size.kind_name == "stablelm" and values.get("use_parallel_residual"):
        return 1
    return kind.norms


def _embeddings(size: _Sizes, kind: Kind) -> int:
    """What is outside of the blocks."""
    width, vocabulary = size("hidden_size"), size("vocab_size")
    tied = size.values.get("tie_word_embeddings")
    row = size("word_embed_proj_dim", width)
    found = (1 if (kind.tied if tied is None else tied) else 2) * vocabulary * row
    found += 0 if row == width else 2 * row * width
    if kind.positions:
        # OPT leaves two rows free
        rows = size("max_position_embeddings") + (2 if size.kind_name == "opt" else 0)
        found += rows * width
    norms = kind.last_norm + (size.kind_name == "bloom")
    if size.kind_name == "opt" and size.values.get("do_layer_norm_before") is False:
        norms = 0
    found += norms * width * (2 if kind.norm_bias else 1)
    return found + (vocabulary if kind.head_bias else 0)
