"""A tokenizer for checks on text, from its files alone: loads in milliseconds and needs no torch.

``transformers`` imports torch wherever it is installed. Ingest only needs the end-of-sequence
token, the chat template and a count of tokens, which the files hold. Training itself uses
transformers' tokenizer (``dpo.data.tokenize.load_tokenizer``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.data.special_tokens import read_json, special_tokens
from dpo.errors import ModelError


class _Templated:
    """A tokenizer with a chat template, which runs the same with and without transformers."""

    def __init__(self, chat_template: str | None, tokens: dict[str, str]) -> None:
        self.chat_template = chat_template
        self._tokens = tokens

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """``messages`` as the text that the model expects: see ``chat_template.render``."""
        # not before it is needed: Jinja takes longer to load than the tokenizer
        from dpo.data.chat_template import render

        assert not tokenize
        template = self.chat_template or ""
        return render(template, messages, self._tokens, open_=add_generation_prompt)


class TextTokenizer(_Templated):
    """The part of a transformers tokenizer that ingest uses, with the same names."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.folder = folder
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        config = read_json(folder / "tokenizer_config.json")
        tokens = special_tokens(folder, config)
        super().__init__(_template_of(folder, config), tokens)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.all_special_tokens = [token.content for token in added if token.special]
        self.eos_token: str = tokens.get("eos_token", "")
        self.eos_token_id: int | None = self._tokenizer.token_to_id(self.eos_token)

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Token ids of ``text``."""
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return {"input_ids": ids}

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special ones; in parallel."""
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding) for encoding in found]


class _OfTransformers(_Templated):
    """transformers' own tokenizer, with chat templates run as they are here."""

    def __init__(self, inner: Any) -> None:
        super().__init__(_usual(inner.chat_template), dict(inner.special_tokens_map))
        self._inner = inner

    def __call__(self, text: str, *, add_special_tokens: bool = False) -> dict[str, list[int]]:
        found: dict[str, list[int]] = self._inner(text, add_special_tokens=add_special_tokens)
        return found

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        return [len(self(text)["input_ids"]) for text in texts]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def load_text_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The light tokenizer of ``folder``, or transformers' where there is no ``tokenizer.json``.

    Args:
        folder: Where its files are.
        trust_remote_code: Run code that comes with it, where it has no ``tokenizer.json``.

    Raises:
        ModelError: no tokenizer, or none with an end-of-sequence token.
    """
    if not (folder / "tokenizer.json").is_file():
        from dpo.data.tokenize import load_tokenizer

        return _OfTransformers(load_tokenizer(folder, trust_remote_code=trust_remote_code))
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


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return _usual(config.get("chat_template"))


def _usual(templates: Any) -> str | None:
    """The default one of several named templates (a list or a mapping); a single one itself."""
    if isinstance(templates, list):
        templates = {item["name"]: item["template"] for item in templates}
    found = templates.get("default") if isinstance(templates, Mapping) else templates
    return found if isinstance(found, str) else None
