"""Text to token ids, with the truncation of the DPO reference code.

Prompt and responses are tokenised apart, without special tokens, and the end-of-sequence token is
appended to each response. When the prompt with its longest response exceeds ``max_length``, the
prompt is cut to ``max_prompt_length``; when that is not enough, the responses are cut to
``max_length - max_prompt_length``. (A prompt shorter than ``max_prompt_length`` is cut nowhere, and
the responses keep the same limit: so does the reference code.)

Axes: T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dpo.data.quiet import quiet
from dpo.errors import DataError, ModelError

Ids = npt.NDArray[np.int32]
TruncationMode = Literal["keep_end", "keep_start"]

_SENTENCEPIECE = b"\x0a"
"""First byte of a file that SentencePiece wrote: of protobuf's first field, the pieces."""
_TEXT = "\n\nHuman: How do I write a test?\n\nAssistant: Begin with what may go wrong, 123."


@dataclass(frozen=True)
class Limits:
    """How long examples may be, in tokens."""

    max_length: int
    max_prompt_length: int
    truncation_mode: TruncationMode


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and its responses: chosen and rejected, or the SFT target alone."""

    pair_id: str
    prompt_T: Ids
    responses: tuple[Ids, ...]
    """Each ends with the end-of-sequence token, unless truncation cut it off."""
    prompt_is_cut: bool = False
    a_response_is_cut: bool = False

    @property
    def n_tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt_T) + sum(map(len, self.responses))

    def tokens_hash(self) -> str:
        """Changes with the tokenizer, the truncation and the text."""
        digest = hashlib.sha256()
        for ids_T in (self.prompt_T, *self.responses):
            digest.update(len(ids_T).to_bytes(4, "big") + ids_T.tobytes())
        return digest.hexdigest()[:16]


def load_tokenizer(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer without its model; imports no torch.

    Args:
        folder: Where its files are.
        trust_remote_code: Run code that comes with it.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    # what it would say of a tokenizer that cannot be loaded is in the message
    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        if not trust_remote_code and ("trust_remote_code" in str(error) or _has_code(folder)):
            raise ModelError(
                "the tokenizer needs code that comes with it, which does not run unless it is "
                "allowed",
                where=str(folder),
                fix="set model.trust_remote_code=true if you trust its source",
            ) from None
        reason = str(error).splitlines()[0]
        if _is_of_config(folder, error):
            raise ModelError(
                f"the model's configuration cannot be read: {reason}",
                where=str(Path(folder, "config.json")),
                fix="correct that file (a type's name may be wrong), or fetch the model again",
            ) from None
        if problem := _sentencepiece(Path(folder)):
            raise problem from None
        raise ModelError(
            f"the tokenizer cannot be loaded: {reason}",
            where=str(folder),
            fix="set model.tokenizer_name_or_path to a folder or hub id that has one",
        ) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token: responses would never end",
            where=str(folder),
            fix="use a tokenizer with eos_token set in tokenizer_config.json",
        )
    return tokenizer


def _is_of_config(folder: Path | str, problem: Exception) -> bool:
    """Whether it is config.json that transformers fails over: it reads it for the tokenizer too."""
    from transformers import AutoConfig

    if not Path(folder, "config.json").is_file():
        return False
    try:
        AutoConfig.from_pretrained(str(folder))
    except Exception as error:
        return str(error) == str(problem)
    return False


def _sentencepiece(folder: Path) -> ModelError | None:
    """What to say where it is SentencePiece that transformers lacks: it then asks for tiktoken."""
    found = [path for path in folder.glob("*.model") if path.read_bytes()[:1] == _SENTENCEPIECE]
    if not found or (folder / "tokenizer.json").is_file():
        return None
    installed = find_spec("sentencepiece") is not None
    return ModelError(
        f"the tokenizer is there as {found[0].name} alone, which needs the package sentencepiece: "
        f"it is {'here, but could not read the file' if installed else 'not installed'}",
        where=str(found[0]),
        fix="write tokenizer.json beside it once, where transformers and sentencepiece are: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER). Or set "
        "model.tokenizer_name_or_path to a folder or hub id that has one",
    )


def _has_code(folder: Path | str) -> bool:
    """Whether a tokenizer names code beside it: transformers tries the model's kind without it."""
    try:
        values = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        return "AutoTokenizer" in values.get("auto_map", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def moved_ids(own: Any, other: Any) -> int | None:
    """None where two tokenizers read texts alike; else how many tokens have another number.

    The other one may have more tokens.
    """
    ids, expected = (t(_TEXT, add_special_tokens=False)["input_ids"] for t in (other, own))
    known = own.get_vocab()
    moved = sum(known.get(token, n) != n for token, n in other.get_vocab().items())
    return moved if moved or ids != expected else None


def tokenize_pair(
    prompt: str,
    responses: Sequence[str],
    tokenizer: Any,
    limits: Limits,
    *,
    prompt_format: str = "raw",
    pair_id: str = "",
) -> TokenizedExample:
    """Token ids of a prompt and its responses, truncated.

    Args:
        prompt: The text before the response. With ``prompt_format="chat"`` it holds the chat
            template's own special tokens.
        responses: Texts that may follow it.
        tokenizer: A transformers tokenizer.
        limits: Longest lengths, in tokens.
        prompt_format: ``raw`` or ``chat``.
        pair_id: Named in errors.

    Raises:
        DataError: the end-of-sequence token stands inside a text, or the prompt has no token.
    """
    eos = tokenizer.eos_token_id
    prompt_ids = _ids(tokenizer, prompt)
    response_ids = [_ids(tokenizer, text) for text in responses]
    checked = response_ids if prompt_format == "chat" else [prompt_ids, *response_ids]
    if any(eos in ids for ids in checked):
        raise DataError(
            f"the end-of-sequence token {tokenizer.eos_token!r} stands inside a text",
            where=f"pair {pair_id}" if pair_id else prompt[:60],
            fix="remove it from the data: training on it would teach the model to stop there",
        )
    if not prompt_ids:
        # nothing would predict the first token of a response
        raise DataError(
            "the tokenizer gives no token for the prompt",
            where=f"pair {pair_id}" if pair_id else prompt[:60],
            fix="remove the pair, or use a model whose tokenizer knows its script",
        )
    response_ids = [[*ids, eos] for ids in response_ids]
    longest, whole = max(map(len, response_ids)), len(prompt_ids)
    if len(prompt_ids) + longest > limits.max_length:
        if limits.truncation_mode == "keep_end":
            prompt_ids = prompt_ids[-limits.max_prompt_length :]
        else:
            prompt_ids = prompt_ids[: limits.max_prompt_length]
    if len(prompt_ids) + longest > limits.max_length:
        room = limits.max_length - limits.max_prompt_length
        response_ids = [ids[:room] for ids in response_ids]
    return TokenizedExample(
        pair_id=pair_id,
        prompt_T=np.asarray(prompt_ids, dtype=np.int32),
        responses=tuple(np.asarray(ids, dtype=np.int32) for ids in response_ids),
        prompt_is_cut=len(prompt_ids) < whole,
        a_response_is_cut=max(map(len, response_ids)) < longest,
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
