"""A tokenizer for checks on text, from its files alone: loads in milliseconds and needs no torch.

``transformers`` imports torch wherever it is installed. Ingest only needs the end-of-sequence
token, the chat template and a count of tokens, which the files hold. Training itself uses
transformers' tokenizer (``dpo.data.tokenize.load_tokenizer``).
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo.errors import ModelError


class TextTokenizer:
    """The part of a transformers tokenizer that ingest uses, with the same names."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        config = _json(folder / "tokenizer_config.json")
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.all_special_tokens = [token.content for token in added if token.special]
        self._special = {
            name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        }
        self.eos_token: str = self._special["eos_token"] or ""
        self.eos_token_id: int | None = self._tokenizer.token_to_id(self.eos_token)
        template = folder / "chat_template.jinja"
        self.chat_template: str | None = (
            template.read_text(encoding="utf-8")
            if template.is_file()
            else config.get("chat_template")
        )

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(self.chat_template or "")

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Token ids of ``text``."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return {"input_ids": ids}

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """``messages`` as the text that the model expects; templates run in Jinja's sandbox."""
        assert not tokenize
        text: str = self._template.render(
            messages=messages, add_generation_prompt=add_generation_prompt, **self._special
        )
        return text


def load_text_tokenizer(folder: Path) -> Any:
    """The light tokenizer of ``folder``, or transformers' where there is no ``tokenizer.json``.

    Raises:
        ModelError: no tokenizer, or none with an end-of-sequence token.
    """
    if not (folder / "tokenizer.json").is_file():
        from dpo.data.tokenize import load_tokenizer

        return load_tokenizer(folder)
    try:
        tokenizer = TextTokenizer(folder)
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            where=str(folder / "tokenizer.json"),
            fix="fetch the model's tokenizer again",
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token: responses would never end",
            where=str(folder),
            fix="set eos_token in tokenizer_config.json",
        )
    return tokenizer


def _refuse(message: str) -> None:
    raise ValueError(message)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
