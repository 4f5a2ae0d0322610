"""Gives every candidate its place in the data, or the reason why it has none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dpo.data.chat import to_chat
from dpo.data.formats import Candidate, RowError
from dpo.data.schema import TEST, TRAIN, Pair, pair_id, split_of
from dpo.data.tokenize import Limits, tokenize_pair

_ALLOWED_CONTROLS = "\n\r\t"


@dataclass(frozen=True)
class Rejected:
    """A row that is not used, and why."""

    source: str
    file: str
    line: int
    reason: str
    field: str
    advice: str
    value: Any

    def as_json(self) -> dict[str, Any]:
        """For the quarantine file: with the row itself, so that it can be mended."""
        return {
            "source": self.source,
            "file": self.file,
            "line": self.line,
            "reason": self.reason,
            "field": self.field,
            "advice": self.advice,
            "row": self.value,
        }

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.advice} ({self.reason})"


@dataclass
class Validator:
    """Checks candidates one after the other; remembers what it needs to see repetitions."""

    tokenizer: Any
    limits: Limits
    prompt_format: str
    test_fraction: float
    seen: dict[str, str] = field(default_factory=dict)
    """Pair id to the place where it was first seen."""
    opposite: set[str] = field(default_factory=set)
    """Ids of the seen pairs with chosen and rejected exchanged."""
    truncated: Counter[str] = field(default_factory=Counter)

    def check(self, candidate: Candidate, source: str, place: str) -> Pair:
        """The pair row of a candidate.

        Raises:
            RowError: with the reason for which it is rejected.
        """
        texts = {
            "prompt": candidate.prompt,
            "chosen": candidate.chosen,
            "rejected": candidate.rejected,
        }
        if candidate.sft_target is not None:
            texts["sft_target"] = candidate.sft_target
        for name, text in texts.items():
            self._check_text(name, text)
        if candidate.chosen.strip() == candidate.rejected.strip():
            raise RowError("chosen_equals_rejected", "chosen and rejected are the same text")
        split = candidate.split or split_of(candidate.prompt, self.test_fraction)
        if self.prompt_format == "chat":
            candidate = to_chat(candidate, self.tokenizer)
        self._check_tokens(candidate)
        found = Pair(
            prompt=candidate.prompt,
            chosen=candidate.chosen,
            rejected=candidate.rejected,
            sft_target=candidate.sft_target or candidate.chosen,
            dataset=source,
            split=split,
            pair_id=pair_id(candidate.prompt, candidate.chosen, candidate.rejected),
        )
        self._check_repetition(found, place)
        return found

    def _check_text(self, name: str, text: str) -> None:
        if not text.strip():
            raise RowError("empty", f"{name} is empty", name)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("broken_encoding", f"{name} has half a character in it", name) from None
        bad = next((c for c in text if ord(c) < 32 and c not in _ALLOWED_CONTROLS), None)
        if bad is not None:
            raise RowError(
                "control_character", f"{name} has the control character U+{ord(bad):04X}", name
            )
        eos = self.tokenizer.eos_token
        if eos in text:
            raise RowError(
                "eos_in_text", f"{name} has the end-of-sequence token {eos} in its text", name
            )

    def _check_tokens(self, candidate: Candidate) -> None:
        """Pairs that truncation would spoil; most are too short: a token has at least one byte."""
        texts = (candidate.prompt, candidate.chosen, candidate.rejected)
        longest = len(texts[0].encode()) + max(len(text.encode()) for text in texts[1:]) + 1
        if longest <= self.limits.max_length:
            return
        example = tokenize_pair(
            candidate.prompt,
            texts[1:],
            self.tokenizer,
            self.limits,
            prompt_format=self.prompt_format,
        )
        chosen, rejected = (response.tolist() for response in example.responses)
        cut = chosen[-1] != self.tokenizer.eos_token_id or (
            rejected[-1] != self.tokenizer.eos_token_id
        )
        if cut:
            self.truncated["responses"] += 1
        if len(example.prompt_T) == self.limits.max_prompt_length:
            self.truncated["prompts"] += 1
        if chosen == rejected:
            raise RowError(
                "identical_after_truncation",
                "chosen and rejected differ only after the part that is kept: raise max_length",
            )

    def _check_repetition(self, pair: Pair, place: str) -> None:
        if first := self.seen.get(pair.pair_id):
            raise RowError("duplicate", f"the same pair stands in {first}")
        if pair.pair_id in self.opposite:
            raise RowError(
                "contradiction", "another row prefers these two responses the other way round"
            )
        self.seen[pair.pair_id] = place
        self.opposite.add(pair_id(pair.prompt, pair.rejected, pair.chosen))


def leaked_prompts(pairs: list[Pair]) -> set[str]:
    """Ids of training pairs whose prompt is in the test split too: they stay out of training."""
    held_out = {pair.prompt for pair in pairs if pair.split == TEST}
    return {pair.pair_id for pair in pairs if pair.split == TRAIN and pair.prompt in held_out}
