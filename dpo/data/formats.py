"""From a source's row to prompt, chosen and rejected: one function a format.

A parser gets a row (a JSON object) and returns candidates, or raises ``RowError`` with the reason
for which the row is rejected. It decides nothing about other rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.schema import SPLIT_WORDS

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"
SHP_MIN_SCORE_RATIO = 2.0


class Message(NamedTuple):
    """One turn of a dialogue."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str


class Candidate(NamedTuple):
    """A pair that has not been validated yet."""

    prompt: str
    chosen: str
    rejected: str
    sft_target: str | None = None
    split: str | None = None
    messages: tuple[Message, ...] | None = None
    """The prompt as turns, where the source has them; ``prompt`` is their text."""


class Rating(NamedTuple):
    """One answer and how good it is; the answers to a prompt become pairs."""

    prompt: str
    messages: tuple[Message, ...] | None
    """The prompt as turns, where the source has them; ``prompt`` is their text."""
    answer: str
    score: float
    """Higher is better."""
    split: str | None = None
    field: str = "completion"
    """What the row calls the answer."""


class RowError(Exception):
    """Why a row is rejected.

    Args:
        reason: A word of the report, such as ``missing_field``.
        advice: One sentence for a person: what is wrong and what to do.
        field: The field at fault.
    """

    def __init__(self, reason: str, advice: str, field: str = "") -> None:
        super().__init__(reason, advice, field)
        self.reason, self.advice, self.field = reason, advice, field


Parser = Callable[[Mapping[str, Any]], Sequence[Candidate | Rating]]


_WHOLE_DIALOGUE = re.compile(rf"\s*(?:Human|System):.*{ASSISTANT}", re.DOTALL)


def pairs(row: Mapping[str, Any]) -> list[Candidate]:
    """``{prompt, chosen, rejected}`` as text; ``sft_target`` and ``split`` may be there.

    Answers that are whole dialogues, with the prompt in them, are divided as ``hh`` does.
    """
    prompt, chosen, rejected = (text_field(row, name) for name in ("prompt", "chosen", "rejected"))
    target = text_field(row, "sft_target") if row.get("sft_target") is not None else None
    if _WHOLE_DIALOGUE.match(chosen) and _WHOLE_DIALOGUE.match(rejected):
        (found,) = hh(row)
        if prompt.strip() not in found.prompt:
            raise RowError(
                "prompts_differ",
                "the field prompt is not in the dialogues of both answers",
                "prompt",
            )
        return [found._replace(sft_target=target and target.removeprefix(found.prompt))]
    return [Candidate(prompt, chosen, rejected, target, split_field(row))]


def hh(row: Mapping[str, Any]) -> list[Candidate]:
    """Anthropic's dialogues: the prompt ends with the last ``\\n\\nAssistant:`` of both."""
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    prompts = []
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        end = text.rfind(ASSISTANT)
        if end < 0:
            raise RowError(
                "no_assistant_turn",
                f"{field} has no {ASSISTANT.strip()!r} turn: write dialogues as "
                "'\\n\\nHuman: ...\\n\\nAssistant: ...'",
                field,
            )
        prompts.append(text[: end + len(ASSISTANT)])
    if prompts[0] != prompts[1]:
        raise RowError(
            "prompts_differ",
            "chosen and rejected answer different dialogues: their text up to the last "
            "'Assistant:' must be the same",
            "rejected",
        )
    prompt = prompts[0]
    return [
        Candidate(prompt, chosen[len(prompt) :], rejected[len(prompt) :], split=split_field(row))
    ]


def common_text(row: Mapping[str, Any]) -> list[Candidate]:
    """TRL's implicit prompt: what two texts begin with alike, up to the last word both have whole.

    ``The sky is blue.`` and ``The sky is black.`` answer ``The sky is``.
    """
    chosen, rejected = text_field(row, "chosen"), text_field(row, "rejected")
    length = max(0, min(len(chosen), len(rejected)) - 1)
    if chosen != rejected:
        # white space belongs to the answers, as tokenizers have it
        unlike = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        length = next(unlike, length)
        while length and not chosen[length : length + 1].isspace():
            length -= 1
        length = len(chosen[:length].rstrip())
    if not length:
        raise RowError(
            "no_common_prompt",
            "there is no prompt, and chosen and rejected do not begin alike: give prompt, or "
            "dialogues written as '\\n\\nHuman: ...\\n\\nAssistant: ...'",
            "prompt",
        )
    prompt = chosen[:length]
    return [Candidate(prompt, chosen[length:], rejected[length:], split=split_field(row))]


def shp(row: Mapping[str, Any], min_score_ratio: float = SHP_MIN_SCORE_RATIO) -> list[Candidate]:
    """Stanford Human Preferences: two comments on a post; kept from a ratio of their scores on."""
    prompt = f"{HUMAN} {text_field(row, 'history')}{ASSISTANT}"
    scores = [number_field(row, "score_A"), number_field(row, "score_B")]
    responses = [f" {text_field(row, name)}" for name in ("human_ref_A", "human_ref_B")]
    label = row.get("labels")
    label = {"0": 0, "1": 1}.get(label, label) if isinstance(label, str) else label
    if label not in (0, 1):
        raise RowError("wrong_type", "labels must be 0 (B is better) or 1 (A is better)", "labels")
    if min(scores) <= 0 or max(scores) / min(scores) < min_score_ratio:
        raise RowError(
            "score_ratio_too_low",
            "the two scores are too close to tell which is better",
            "score_A",
        )
    chosen, rejected = responses if label == 1 else reversed(responses)
    return [Candidate(prompt, chosen, rejected, split=split_field(row))]


def text_field(row: Mapping[str, Any], name: str) -> str:
    """The text of a field.

    Raises:
        RowError: it is missing, or not a text.
    """
    if name not in row or row[name] is None:
        raise RowError("missing_field", f"the field {name} is missing", name)
    value = row[name]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError("wrong_type", f"{name} must be a text, found a {kind}", name)
    return value


def number_field(row: Mapping[str, Any], name: str) -> float:
    """The number in a field; CSV files have numbers as text.

    Raises:
        RowError: it is missing, or not a finite number.
    """
    value = row.get(name)
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):
                return number
    except (ValueError, OverflowError):
        pass
    raise RowError("wrong_type", f"{name} must be a number, found {str(value)[:40]!r}", name)


def split_field(row: Mapping[str, Any]) -> str | None:
    """``train`` or ``test``, where the row says so.

    Raises:
        RowError: another word.
    """
    value = row.get("split")
    if value is None:
        return None
    split = SPLIT_WORDS.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise RowError("wrong_split", f"split must be train or test, found {value!r}", "split")
    return split
