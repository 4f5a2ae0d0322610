"""Gives a candidate its place in the data, or the reason why it has none.

What is decided here needs the candidate alone; ``dpo.data.repeats`` judges rows beside each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dpo.data import repeats
from dpo.data.alike import NO_WIDTH, look_alike
from dpo.data.chat import marks_of, to_chat, turns
from dpo.data.encodings import not_utf8
from dpo.data.formats import ASSISTANT, HUMAN, Candidate, Message, RowError
from dpo.data.messages import SYSTEM, as_text
from dpo.data.placeholders import PLACEHOLDERS
from dpo.data.schema import TEST, TRAIN, pair_id, prompt_digest, split_of
from dpo.data.tokenize import Limits, tokenize_pair

CONTROLS = bytes(code for code in range(32) if code not in b"\n\r\t") + b"\x7f"
INVISIBLE = re.compile(f"[\\s{NO_WIDTH}]*")
"""White space, and characters of no width."""
PLACEHOLDER_CHARS = 24
"""No longer is a text that holds one of these and white space, if it is told."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_HIGH_CONTROL = re.compile(rb"\xc2[\x80-\x9f]")
"""U+0080 to U+009F."""
MISREAD = re.compile(
    rb"\xc3(?:\xa2\xe2\x82\xac(?:\xe2\x84\xa2|\xe2\x80[\x9c\x9d\xb9]|\xc5\x93|\xcb\x9c|\xc2[\xa2\xa6])"
    rb"|\x83\xc2[\xa1-\xaa\xac-\xba\xbc-\xbf])"
)
"""Quotes, dashes and letters with accents whose UTF-8 was read as Windows-1252. Before guillemets
and spaces that do not break the letter is one of Portuguese."""
TURN_MARKS = (HUMAN, ASSISTANT, SYSTEM)
_TURN = re.compile("|".join(TURN_MARKS))
_SPEAKER = re.compile(f"{HUMAN}|{ASSISTANT}")
"""What divides a dialogue that is one text; without a system message, "System:" is a word."""
_EMPTY_TURN = re.compile(r"\n\n(?:Human|Assistant):\s*\n\n(?:Human|Assistant):")
_HEADINGS = {mark[1:] for mark in TURN_MARKS}
"""Lines that begin a turn in the text of a dialogue; some chat templates write the same."""
_ADVICE_ON_ENCODING = "read the original with its true encoding and save it as UTF-8"


def _half_characters(name: str, text: str) -> str:
    try:
        # bytes of a CSV file that are no UTF-8 are kept in such characters
        return f"{name}: {not_utf8(text.encode('utf-8', 'surrogateescape'))}"
    except UnicodeEncodeError:
        return f"{name} has half a character in it: {_ADVICE_ON_ENCODING}"


def _any_of(texts: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _stripped(candidate: Candidate) -> Candidate:
    """The same with its turns stripped, and their text as the prompt."""
    messages = tuple(Message(role, said.strip()) for role, said in candidate.messages or ())
    return candidate._replace(prompt=as_text(messages), messages=messages)


def _check_dialogue(candidate: Candidate) -> None:
    """A dialogue that is one text: each turn is one, and the answers end it."""
    if _EMPTY_TURN.search(f"\n\n{candidate.prompt}"):
        raise RowError("empty", "a turn of the dialogue is empty", "prompt")
    marks = _TURN if candidate.prompt.lstrip().startswith(SYSTEM.strip()) else _SPEAKER
    for name in ("chosen", "rejected", "sft_target"):
        _refuse_turn(name, getattr(candidate, name) or "", marks)


def _refuse_turn(name: str, text: str, marks: re.Pattern[str]) -> None:
    if found := marks.search(text):
        raise RowError(
            "turn_mark_in_text",
            f"{name} has a line that begins with {found[0].strip()} after an empty one, which is "
            "how the text of a dialogue marks a turn: remove it",
            name,
        )


def _refuse_equal(chosen: str, rejected: str) -> None:
    if chosen == rejected:
        advice = "chosen and rejected are the same text"
        raise RowError("chosen_equals_rejected", advice, "rejected")
    if look_alike(chosen, rejected):
        raise RowError(
            "chosen_equals_rejected",
            "chosen and rejected look the same: they differ only in spaces, in characters that "
            "nobody sees or in how accents are written",
            "rejected",
        )


class Checked(NamedTuple):
    """A pair that stands for itself."""

    values: tuple[Any, ...]
    """The columns of its row: see ``schema.pair_fields``."""
    key: bytes
    """A ``repeats.KEY``, by which it is told from others."""
    chars: int
    """Characters of its texts, for buffers."""


@dataclass
class Validator:
    """Checks the candidates of one source, one after the other; remembers nothing."""

    tokenizer: Any
    limits: Limits
    prompt_format: str
    test_fraction: float
    dataset: str
    split: str = "auto"
    """See ``SourceConfig.split``."""
    max_prompt_tokens: int | None = None
    """Longer prompts are rejected, before any chat template."""
    mark: repeats.Mark = field(default_factory=repeats.Mark)

    def check(self, candidate: Candidate) -> Checked:
        """The pair of a candidate.

        Raises:
            RowError: with the reason for which it is rejected.
        """
        self.check_text("prompt", candidate.prompt)
        self.check_text("chosen", candidate.chosen)
        self.check_text("rejected", candidate.rejected)
        if candidate.sft_target is not None:
            self.check_text("sft_target", candidate.sft_target)
        in_chat = self.prompt_format == "chat"
        if in_chat and not candidate.messages:
            candidate = candidate._replace(messages=turns(candidate.prompt))
        if candidate.messages:
            self._check_messages(candidate)
        elif ASSISTANT in candidate.prompt:
            _check_dialogue(candidate)
        _refuse_equal(candidate.chosen.strip(), candidate.rejected.strip())
        # the split must depend neither on the way a source writes turns nor on the template
        bare = _stripped(candidate) if in_chat else candidate
        digest, near = prompt_digest(bare.prompt), repeats.near_hash(bare.prompt)
        self._check_prompt_length(candidate.prompt)
        split = self._split(candidate, digest)
        if in_chat:
            same = bare.messages == candidate.messages
            candidate = to_chat(candidate, self.tokenizer)
            # prompts are equal where the model sees no difference
            seen = candidate if same else to_chat(bare, self.tokenizer)
            digest = prompt_digest(seen.prompt)
        self._check_truncation(candidate)
        prompt, chosen, rejected, target, _, messages = candidate
        values = (
            *(prompt, chosen, rejected, target or chosen, self.dataset, split),
            pair_id(prompt, chosen, rejected),
            messages and [{"role": role, "content": content} for role, content in messages],
        )
        key = repeats.key(digest, near, chosen, rejected, self.mark, in_test=split == TEST)
        return Checked(values, key, len(prompt) + len(chosen) + len(rejected))

    def _check_messages(self, candidate: Candidate) -> None:
        """No content of a message may begin another turn or steer the model.

        In a list of messages the roles are told apart from the texts, so a mark inside a text is
        never meant as one; a prompt that is one text may be a dialogue by itself.
        """
        for turn in candidate.messages or ():
            if turn.role != "system" and INVISIBLE.fullmatch(turn.content):
                raise RowError("empty", f"a message of the {turn.role} is empty", "prompt")
        texts = [("prompt", turn.content) for turn in candidate.messages or ()]
        texts += [("chosen", candidate.chosen), ("rejected", candidate.rejected)]
        texts += [("sft_target", candidate.sft_target or "")]
        for name, text in texts:
            if self.prompt_format == "raw":
                _refuse_turn(name, f"\n\n{text}", _TURN)
            if found := self._marks.search(text):
                self._refuse_reserved(name, found[0])

    @cached_property
    def _marks(self) -> re.Pattern[str]:
        return _any_of(self.reserved) or re.compile(r"(?!)")

    def _split(self, candidate: Candidate, digest: bytes) -> str:
        if self.split in (TRAIN, TEST):
            return self.split
        own = None if self.split == "hash" else candidate.split
        return own or split_of(digest, self.test_fraction)

    def _check_prompt_length(self, prompt: str) -> None:
        limit = self.max_prompt_tokens
        # a token has one byte or more
        if limit is None or len(prompt.encode()) <= limit:
            return
        count = len(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if count > limit:
            raise RowError(
                "prompt_too_long",
                f"the prompt has {count:,} tokens, {limit:,} are allowed: shorten it, or raise the "
                "source's max_prompt_tokens",
                "prompt",
            )

    def check_text(self, name: str, text: str) -> None:
        """Check one text by itself.

        Raises:
            RowError: it is empty, broken, or holds a text that means something to the model.
        """
        if not text or text.isspace():
            raise RowError("empty", f"{name} is empty", name)
        if len(text) <= PLACEHOLDER_CHARS and text.strip() in PLACEHOLDERS:
            raise RowError(
                "placeholder",
                f"{name} is {text.strip()}, which stands for a text that is missing: give the "
                "text, or leave the row out",
                name,
            )
        if INVISIBLE.fullmatch(text):
            raise RowError("empty", f"{name} has nothing but characters that nobody sees", name)
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("broken_encoding", _half_characters(name, text), name) from None
        if REPLACEMENT in text:
            raise RowError(
                "broken_encoding",
                f"{name} has the mark of a lost character (U+FFFD): {_ADVICE_ON_ENCODING}",
                name,
            )
        if len(data.translate(None, CONTROLS)) != len(data):
            bad = next(char for char in text if ord(char) < 128 and ord(char) in CONTROLS)
            raise RowError(
                "control_character", f"{name} has the control character U+{ord(bad):04X}", name
            )
        # one byte is found many times as fast as a class of them
        if b"\xc2" in data and (high := _HIGH_CONTROL.search(data)):
            raise RowError(
                "control_character",
                f"{name} has the control character U+{ord(high[0].decode()):04X}, as quotes and "
                f"dashes of Windows-1252 become when read as Latin-1: {_ADVICE_ON_ENCODING}",
                name,
            )
        if b"\xc3" in data and (misread := MISREAD.search(data)):
            raise RowError(
                "broken_encoding",
                f"{name} has {misread[0].decode()!r}, as UTF-8 becomes when it is read as "
                f"Windows-1252: {_ADVICE_ON_ENCODING}",
                name,
            )
        reserved = self._reserved_in_prompts if name == "prompt" else self._reserved
        if reserved and (found := reserved.search(text)):
            self._refuse_reserved(name, found[0])

    @cached_property
    def _reserved(self) -> re.Pattern[str] | None:
        return _any_of(self.reserved)

    @cached_property
    def _reserved_in_prompts(self) -> re.Pattern[str] | None:
        """Without the headings that a dialogue has as one text: its turns are checked apart."""
        return _any_of([text for text in self.reserved if text not in _HEADINGS])

    @cached_property
    def reserved(self) -> list[str]:
        """Texts that mean something to the model: the end mark, all special tokens, and the marks
        of the chat template, longer ones first."""
        marks = {self.tokenizer.eos_token, *self.tokenizer.all_special_tokens}
        # transformers' tokenizers name some of them here only
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        marks |= {token.content for token in added if token.special}
        if self.prompt_format == "chat":
            # marks that the tokenizer does not know as tokens
            marks |= marks_of(self.tokenizer)
        # longer ones first: the message names what stands there
        return sorted((text for text in marks if text), key=lambda text: (-len(text), text))

    def _refuse_reserved(self, name: str, found: str) -> None:
        if found == self.tokenizer.eos_token:
            raise RowError(
                "eos_in_text",
                f"{name} has the end-of-sequence token {found} in its text: remove it, or the "
                "model learns to stop there",
                name,
            )
        mark = found.strip()
        raise RowError(
            "special_token_in_text",
            f"{name} has {mark} in its text, which is a mark to the model: remove it, or put a "
            f"space inside it ({mark[:1]} {mark[1:]}) where the letters are meant"
            + (", or give turns as messages" if name == "prompt" else ""),
            name,
        )

    @cached_property
    def answer_bytes(self) -> int:
        """Responses that differ within so many bytes differ after any truncation."""
        # the first token may stand for the start of the text alone
        return self.limits.max_length - self.limits.max_prompt_length - 1

    def _check_truncation(self, candidate: Candidate) -> None:
        """Pairs that truncation makes equal, or of which it leaves white space alone.

        Responses are cut to ``max_length - max_prompt_length`` tokens at least. A token has one
        byte or more, so responses that differ within so many bytes differ after the cut too: only
        the others need the tokenizer.
        """
        n_bytes = self.answer_bytes
        chosen, rejected = candidate.chosen[:n_bytes], candidate.rejected[:n_bytes]
        alike = chosen.encode()[:n_bytes] == rejected.encode()[:n_bytes]
        blank = self._blank_parts(candidate)
        if not alike and not blank:
            return
        if not self.tokenizer(candidate.prompt, add_special_tokens=False)["input_ids"]:
            raise RowError(
                "empty_after_truncation",
                "the tokenizer gives no token for prompt: remove the row, or use a model whose "
                "tokenizer knows its script",
                "prompt",
            )
        example = tokenize_pair(
            candidate.prompt,
            (candidate.chosen, candidate.rejected),
            self.tokenizer,
            self.limits,
            prompt_format=self.prompt_format,
        )
        chosen_T, rejected_T = example.responses
        if alike and np.array_equal(chosen_T, rejected_T):
            raise RowError(
                "identical_after_truncation",
                f"chosen and rejected differ only after the {n_bytes + 1} tokens that are kept: "
                "raise max_length or lower max_prompt_length",
                "rejected",
            )
        kept = {"prompt": example.prompt_T, "chosen": chosen_T, "rejected": rejected_T}
        for name, part in blank.items():
            ids = self.tokenizer(part, add_special_tokens=False)["input_ids"]
            if set(kept[name].tolist()) <= set(ids):
                raise RowError(
                    "empty_after_truncation",
                    f"of {name} nothing but white space is left once it is cut: remove that, or "
                    "raise max_length",
                    name,
                )

    def _blank_parts(self, candidate: Candidate) -> dict[str, str]:
        """The texts that may be cut to white space, and what of them may be left."""
        found = {}
        for name, text in zip(("prompt", "chosen", "rejected"), candidate[:3], strict=True):
            part = self.kept_bytes(name, text.encode()).decode(errors="ignore")
            if len(part) < len(text) and INVISIBLE.fullmatch(part):
                at_end = name == "prompt" and self.limits.truncation_mode == "keep_end"
                step = -1 if at_end else 1
                blank = INVISIBLE.match(text[::step])
                found[name] = blank[0][::step] if blank else ""
        return found

    def kept_bytes(self, name: str, text: bytes) -> bytes:
        """What is left of a text, at least, where it is cut: a token has one byte or more."""
        if name != "prompt":
            return text[: self.answer_bytes]
        limit = self.limits.max_prompt_length
        return text[-limit:] if self.limits.truncation_mode == "keep_end" else text[:limit]
