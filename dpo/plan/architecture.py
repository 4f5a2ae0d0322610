"""The shape of a decoder-only model, from its configuration: parameters and sizes, no weights.

Shapes of the shipped ``model=`` choices stand in ``architectures.json`` (the fields of their
``config.json`` on the hub), so nothing is downloaded; any folder with a ``config.json`` is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dpo.config.places import BUILTIN_PREFIX, builtin
from dpo.config.schema import ModelConfig
from dpo.errors import ModelError
from dpo.storage.base_model import PACKAGED_ID, packaged_folder

_GATED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "smollm3")
_KNOWN = ("gpt_neox", "gpt2", "gptj", "llama", "mistral")


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model; all are counts."""

    model_type: str
    n_layers: int
    width: int
    """Hidden size."""
    n_heads: int
    n_kv_heads: int
    head_size: int
    mlp_width: int
    gated: bool
    """The MLP has a gate: three matrices instead of two."""
    vocabulary: int
    """Rows of the embeddings."""
    context: int
    """Longest sequence, in tokens."""
    tied: bool
    """Input and output embeddings are one matrix."""
    learned_positions: bool
    exact: bool
    """Whether biases and norms of this ``model_type`` are known; else they are left out, an error
    below 1 % of the parameters."""

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.n_kv_heads * self.head_size

    @property
    def query_width(self) -> int:
        """Width of the queries."""
        return self.n_heads * self.head_size

    @property
    def block_matrices(self) -> int:
        """Weights of one block that multiply every token."""
        attention = self.width * (2 * self.query_width + 2 * self.kv_width)
        return attention + (3 if self.gated else 2) * self.width * self.mlp_width

    @property
    def block_parameters(self) -> int:
        """All weights of one block."""
        rest = {
            # biases of qkv, output and MLP, and two layer norms
            "gpt_neox": 9 * self.width + self.mlp_width,
            "gpt2": 9 * self.width + self.mlp_width,
            # biases of the MLP, and one layer norm
            "gptj": 3 * self.width + self.mlp_width,
        }
        return self.block_matrices + rest.get(self.model_type, 2 * self.width)

    @property
    def embedding_parameters(self) -> int:
        """Input and output embeddings, learned positions, last norm."""
        found = (1 if self.tied else 2) * self.vocabulary * self.width
        found += self.context * self.width if self.learned_positions else 0
        found += self.vocabulary if self.model_type == "gptj" else 0
        return found + (2 if self.model_type in ("gpt_neox", "gpt2", "gptj") else 1) * self.width

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.n_layers * self.block_parameters + self.embedding_parameters


def from_config(values: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` of transformers describes.

    Raises:
        ModelError: it lacks a size.
    """
    kind = str(values.get("model_type", ""))

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(values.get(name), int):
                return int(values[name])
        if default is None:
            raise ModelError(
                f"the model's configuration has no {names[0]}",
                where=f"model_type {kind or 'missing'}",
                fix="`dpo plan` knows decoder-only models of transformers; give another model",
            )
        return default

    width = size("hidden_size", "n_embd")
    n_heads = size("num_attention_heads", "n_head")
    gated = kind in _GATED or (kind not in _KNOWN and "num_key_value_heads" in values)
    return Architecture(
        model_type=kind,
        n_layers=size("num_hidden_layers", "n_layer"),
        width=width,
        n_heads=n_heads,
        n_kv_heads=size("num_key_value_heads", default=n_heads),
        head_size=size("head_dim", default=width // n_heads),
        mlp_width=size("intermediate_size", "n_inner", default=4 * width),
        gated=gated,
        vocabulary=size("vocab_size"),
        context=size("max_position_embeddings", "n_positions", default=2048),
        # transformers' default is true
        tied=bool(values.get("tie_word_embeddings", kind not in ("gptj", "gpt_neox", *_GATED))),
        learned_positions=kind == "gpt2",
        exact=kind in _KNOWN,
    )


def config_values(model: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that is known or here; no network is used.

    Raises:
        ModelError: the model is neither shipped nor a folder with a ``config.json``.
    """
    name = model.name_or_path
    folder = builtin(name) if name.startswith(BUILTIN_PREFIX) else Path(name).expanduser()
    candidates = [folder, packaged_folder() if name == PACKAGED_ID else None, _in_hub_cache(name)]
    for place in candidates:
        if place is not None and (place / "config.json").is_file():
            return _read(place / "config.json")
    if name in _shipped():
        return _shipped()[name]
    raise ModelError(
        f"the architecture of {name or 'the model'} is not known without the hub",
        where="model.name_or_path",
        fix="give the folder of a model (its config.json is enough), fetch it once with `dpo fetch "
        f"model=...`, or one of {', '.join(_shipped())}",
    )


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture of a configured model, without network and weights.

    Raises:
        ModelError: it is not known here, or its ``config.json`` describes no such model.
    """
    return from_config(config_values(model))


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("architectures.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"config.json is not JSON: {error}", where=str(path), fix="fetch the model again"
        ) from None
    if not isinstance(values, dict):
        raise ModelError("config.json is not a JSON object", where=str(path))
    return values


def _in_hub_cache(name: str) -> Path | None:
    """The newest snapshot of a hub model that was downloaded before."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return None
    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None
