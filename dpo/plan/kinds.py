"""How the blocks of each ``model_type`` of transformers are made, as far as parameters count.

A ``Flag`` is true, false, or the key of config.json that says which, with what it is when absent.
``tests/plan/test_parameters.py`` compares each kind with the model that transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Flag = bool | tuple[str, bool]


def is_set(flag: Flag, values: Mapping[str, Any]) -> bool:
    """What ``flag`` is in a config.json."""
    if isinstance(flag, bool):
        return flag
    found = values.get(flag[0])
    return flag[1] if found is None else bool(found)


@dataclass(frozen=True)
class Kind:
    """What does not stand in config.json, or stands there by a key of its own."""

    gated: bool
    """The MLP has a gate: three matrices instead of two."""
    tied: bool = False
    """Input and output embeddings are one matrix, where config.json does not say."""
    norms: int = 2
    """Norms of a block over the hidden size."""
    norm_bias: bool = False
    last_norm: bool = True
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    head_bias: bool = False
    head_norms: Literal["", "each", "whole"] = ""
    """Norms of queries and keys: one for each head's size, or one for all heads."""
    fused: bool = False
    """Query, key and value are one matrix."""
    fused_gate: bool = False
    """Of a gated MLP the first two matrices are one."""
    positions: bool = False
    """Learned positions."""
    latent: bool = False
    """Keys and values come from a small common vector (DeepSeek)."""
    router_bias: bool = False


_LLAMA = Kind(gated=True)
_BIASED = Kind(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, fused=True)
_ATTENTION_BIAS: Flag = ("attention_bias", False)
_BIAS: Flag = ("bias", False)
_USE_BIAS: Flag = ("use_bias", True)
_NEOX_BIAS: Flag = ("attention_bias", True)
_MLP_BIAS: Flag = ("mlp_bias", False)
_OPTIONAL = replace(_LLAMA, qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS)
_BOTH_OPTIONAL = replace(_OPTIONAL, mlp_bias=_MLP_BIAS)
_GPTJ = Kind(gated=False, norms=1, norm_bias=True, mlp_bias=True, head_bias=True)

KINDS: dict[str, Kind] = {
    "apertus": replace(_OPTIONAL, gated=False),
    "arcee": replace(_BOTH_OPTIONAL, gated=False),
    "bloom": replace(_BIASED, tied=True),
    "codegen": replace(_GPTJ, fused=True),
    "cohere": replace(_OPTIONAL, tied=True, norms=1),
    "cohere2": replace(_OPTIONAL, tied=True, norms=1),
    "cwm": _LLAMA,
    "deepseek_v2": replace(_LLAMA, latent=True),
    "deepseek_v3": replace(_LLAMA, latent=True),
    "ernie4_5": _LLAMA,
    "exaone4": replace(_LLAMA, head_norms="each"),
    "falcon": replace(_BIASED, tied=True, qkv_bias=_BIAS, out_bias=_BIAS, mlp_bias=_BIAS),
    "gemma": replace(_OPTIONAL, tied=True),
    "gemma2": replace(_OPTIONAL, tied=True, norms=4),
    "gemma3_text": replace(_OPTIONAL, tied=True, norms=4, head_norms="each"),
    "glm": replace(_LLAMA, qkv_bias=_ATTENTION_BIAS, fused_gate=True),
    "glm4": replace(_LLAMA, qkv_bias=_ATTENTION_BIAS, norms=4, fused_gate=True),
    "glm4_moe": replace(_LLAMA, qkv_bias=_ATTENTION_BIAS),
    "gpt2": replace(_BIASED, tied=True, positions=True),
    "gpt_bigcode": replace(_BIASED, tied=True, positions=True),
    "gpt_neo": Kind(
        gated=False, tied=True, norm_bias=True, out_bias=True, mlp_bias=True, positions=True
    ),
    "gpt_neox": replace(_BIASED, qkv_bias=_NEOX_BIAS, out_bias=_NEOX_BIAS),
    "gpt_oss": replace(_OPTIONAL, mlp_bias=True, router_bias=True),
    "gptj": _GPTJ,
    "granite": _BOTH_OPTIONAL,
    "granitemoe": _OPTIONAL,
    "granitemoeshared": replace(_OPTIONAL, fused_gate=True),
    "helium": _BOTH_OPTIONAL,
    "llama": _BOTH_OPTIONAL,
    "minimax_m2": replace(_LLAMA, head_norms="whole"),
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "mpt": Kind(gated=False, tied=True, fused=True),
    "nemotron": Kind(
        gated=False,
        norm_bias=True,
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
    ),
    "olmo": replace(_OPTIONAL, norms=0, last_norm=False),
    "olmo2": replace(_OPTIONAL, head_norms="whole"),
    "olmo3": replace(_OPTIONAL, head_norms="whole"),
    "olmoe": replace(_OPTIONAL, head_norms="whole"),
    "opt": replace(_BIASED, tied=True, positions=True, fused=False),
    "persimmon": replace(_BIASED, tied=False),
    "phi": replace(_BIASED, norms=1, head_bias=True, fused=False),
    "phi3": replace(_LLAMA, fused=True, fused_gate=True),
    "phimoe": replace(_OPTIONAL, norm_bias=True),
    "qwen2": replace(_LLAMA, qkv_bias=True),
    "qwen2_moe": replace(_LLAMA, qkv_bias=("qkv_bias", True)),
    "qwen3": replace(_OPTIONAL, head_norms="each"),
    "qwen3_moe": replace(_OPTIONAL, head_norms="each"),
    "seed_oss": replace(_LLAMA, qkv_bias=("attention_bias", True)),
    "smollm3": replace(_BOTH_OPTIONAL, tied=True),
    "stablelm": replace(_LLAMA, norm_bias=True, qkv_bias=("use_qkv_bias", False)),
    "starcoder2": Kind(
        gated=False,
        tied=True,
        norm_bias=True,
        qkv_bias=_USE_BIAS,
        out_bias=_USE_BIAS,
        mlp_bias=_USE_BIAS,
    ),
}
"""Kinds whose parameters are counted within ``KNOWN_MARGIN``."""
KNOWN_MARGIN = 0.01
UNKNOWN_MARGIN = 0.5
"""Of other kinds. Of 91 such in transformers that have attention, at their default sizes, 46 are
within 2 % and 81 within 50 %; what is not has states beside attention, or embeddings of its own."""

_GATES = ("silu", "swish", "swiglu", "geglu")


def kind_of(values: Mapping[str, Any]) -> tuple[Kind, bool]:
    """The kind of a config.json, and whether it is known; an unknown one counts like Llama.

    Whether such a one has a gate is guessed from its activation: what has SiLU, or names none.
    """
    known = KINDS.get(str(values.get("model_type")))
    if known is not None:
        return known, True
    named = values.get("hidden_act") or values.get("hidden_activation")
    gated = named is None or str(named) in _GATES
    # transformers ties where nothing is said, and older versions of it leave that out
    return replace(_BOTH_OPTIONAL, gated=gated, tied=True), False
