"""What the rows of a run are checked against."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import orjson

from dpo.config.places import chat_templates
from dpo.config.schema import RunConfig
from dpo.data.check import Rules
from dpo.data.special_tokens import kind_of_model
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits
from dpo.errors import ConfigError, ModelError
from dpo.storage.base_model import TOKENIZER_FILES, local_tokenizer
from dpo.storage.manifest import content_hash, sha256_file


def rules_of(config: RunConfig) -> Rules:
    """The rules that the settings state.

    Raises:
        ConfigError: the model's tokenizer cannot be used.
    """
    place = local_tokenizer(config.model)
    template = _template(config)
    trusted = config.model.trust_remote_code
    tokenizer = load_text_tokenizer(place, trust_remote_code=trusted)
    if config.prompt_format == "chat":
        tokenizer.chat_template = template or tokenizer.chat_template
        _try(tokenizer, place)
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    return Rules(place, limits, config.prompt_format, config.test_fraction, template, trusted)


def tokenizer_fingerprint(config: RunConfig) -> str:
    """sha256 over the tokenizer's files and the model's kind, from which its class may follow:
    ingest depends on them and on nothing else of the model.

    Raises:
        ModelError: it is nowhere, or ``config.json`` cannot be read.
    """
    place = local_tokenizer(config.model)
    files = sorted({path for pattern in TOKENIZER_FILES for path in place.glob(pattern)})
    hashes = {path.name: sha256_file(path) for path in files if path.is_file()}
    try:
        kind = orjson.dumps(kind_of_model(place))
    except ValueError:
        raise ModelError(
            "config.json is no JSON", where=str(place), fix="fetch the model again"
        ) from None
    return content_hash({**hashes, "kind": hashlib.sha256(kind).hexdigest()})


def _template(config: RunConfig) -> str | None:
    """The text of the named template, if one is named."""
    if config.chat_template is None:
        return None
    if config.prompt_format != "chat":
        raise ConfigError(
            f"prompt_format={config.prompt_format} uses no chat template",
            where="chat_template",
            fix="set prompt_format=chat as well",
        )
    named = chat_templates().get(config.chat_template)
    return config.chat_template if named is None else named.read_text(encoding="utf-8")


def _try(tokenizer: Any, place: Path) -> None:
    """Refuse a template that takes no dialogue at all, before any row is read."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "prompt_format=chat, but the model's tokenizer has no chat template",
            where=str(place),
            fix=f"set chat_template to one of {', '.join(chat_templates())} or to a file, use "
            "prompt_format=raw, or take a model with a template",
        )
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # a template is a program, and may raise what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"the chat template does not work: {reason}",
            where="chat_template",
            fix="mend the template: it must take one user message",
        ) from None
