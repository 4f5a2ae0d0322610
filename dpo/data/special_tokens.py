"""The special tokens of a tokenizer by name, from its files, as transformers finds them.

The older ``special_tokens_map.json`` (no longer read beside a list of added tokens), then
``tokenizer_config.json``, then what the tokenizer's class has where neither names a token. The
class is named in that file, or follows from the model's kind in ``config.json``: the files of
``gpt2-large`` and ``gpt2-xl`` name no token at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "CodeGenTokenizer": _GPT2,
    "CohereTokenizer": {
        **{"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"},
        **{"pad_token": "<PAD>", "unk_token": "<UNK>"},
    },
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
    "GemmaTokenizer": {
        **{"bos_token": "<bos>", "eos_token": "<eos>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>"},
    },
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": _QWEN,
}
"""What transformers' classes have by themselves; a test compares."""
CLASSES: Mapping[str, str] = {
    **dict.fromkeys(
        ("codegen", "gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(
        ("falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv"),
        "GPTNeoXTokenizer",
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
}
"""The class by the model's kind, where the tokenizer's files name none."""


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and others that are stated, whether or not they are in use.

    Args:
        folder: Of the tokenizer.
        config: Its ``tokenizer_config.json``.
    """
    extra = config.get("extra_special_tokens")
    stated = {**config, **(extra if isinstance(extra, Mapping) else {})}
    if "added_tokens_decoder" not in config:
        stated |= read_json(folder / "special_tokens_map.json")
    # a token that is stated as null is none, whatever the class has
    found = {**_of_class(folder, config), **{key: _content(stated[key]) for key in stated}}
    return {key: text for key, text in found.items() if key.endswith("_token") and text}


def read_json(path: Path) -> dict[str, Any]:
    """An object; empty where there is no such file."""
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def kind_of_model(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says of the tokenizer's class; nothing of weights."""
    model = read_json(folder / "config.json")
    return {name: model.get(name) for name in ("tokenizer_class", "model_type")}


def _of_class(folder: Path, config: Mapping[str, Any]) -> Mapping[str, str]:
    model = kind_of_model(folder)
    named = config.get("tokenizer_class") or model["tokenizer_class"]
    name = named or CLASSES.get(str(model["model_type"]), "")
    return CLASS_TOKENS.get(str(name).removesuffix("Fast"), {})


def _content(token: Any) -> str | None:
    """A token is written as a text, or as an object with its text; settings end in _token too."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None
