"""What an answer answers: the field with the question, what goes with it and stands before it.

prompt                                   as it is: a text, or a list of messages
instruction, question, problem, ...      a text is a user's message
instruction + input                      Alpaca: the input follows the instruction
question + context                       the context follows the question
system, history                          messages before all of these; history is
                                         LLaMA-Factory's [[question, answer], ...]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dpo.data.formats import ASSISTANT, HUMAN, Candidate, Message, Rating, RowError
from dpo.data.messages import (
    Messages,
    as_text,
    candidate,
    check_order,
    is_message,
    read_messages,
    turns_as_text,
)
from dpo.data.placeholders import is_nothing

PROMPTS = (
    *("prompt", "instruction", "question", "problem", "query", "user_prompt", "input"),
    *("trajectory", "context"),
)
"""Names of the field that is answered; the first that a row has counts."""
SYSTEMS = ("system", "system_prompt")
HISTORY = "history"
_BEFORE = frozenset({*SYSTEMS, HISTORY})
_LONG_CHARS = 40
"""Eight words of five letters: from so many in one order on, checks for copied text (8-grams) take
one text for a part of another."""
_WORD_END = re.compile(r"\w$")
_DIALOGUE = re.compile(rf"^\s*(Human|User):|{HUMAN}|{ASSISTANT}")


def prompt_of(row: Mapping[str, Any], *, needed: bool = True) -> tuple[Any, str]:
    """(prompt, its field): a text called ``prompt`` as it is, other texts as a user's message.

    Raises:
        RowError: there is none, or it is neither text nor list.
    """
    field = next((name for name in PROMPTS if row.get(name) is not None), "")
    if not field:
        if needed:
            raise RowError("missing_field", "the field prompt is missing", "prompt")
        return None, ""
    value = row[field]
    if isinstance(value, Mapping) and isinstance(value.get("full_text"), str):
        value = value["full_text"]  # WebGPT: the question with where it is from
    if isinstance(value, str):
        return (value if field == "prompt" else _question(row, field, value)), field
    if not isinstance(value, list | tuple):
        kind = type(value).__name__
        advice = f"{field} must be a text or a list of messages, found a {kind}"
        raise RowError("wrong_type", advice, field)
    return value, field


def _question(row: Mapping[str, Any], field: str, text: str) -> list[Any]:
    """A question with what it is about, as messages."""
    extra = row.get("input") if field == "instruction" else None
    context = row.get("context") if field != "context" else None
    if isinstance(context, list) and context and all(map(is_message, context)):
        asked = {"role": "user", "content": text}
        return (
            context
            if read_messages(context[-1:], "context")[0].content == text
            else [
                *context,
                asked,
            ]
        )
    for name, more in (("input", extra), ("context", context)):
        if isinstance(more, str):
            if not is_nothing(more) and not _repeats(text, more):
                text += f"\n\n{more}"
        elif more:
            kind = type(more).__name__
            raise RowError("wrong_type", f"{name} must be a text, found a {kind}", name)
    return [{"role": "user", "content": text}]


def _repeats(text: str, part: str) -> bool:
    """Whether a text has another one in it on purpose: a long one, or one where a sentence stands.

    A short text stands in many others by chance. So it has to begin the text, a line or what
    follows a heading or a mark (``System:``, ``<|system|>``, ``[INST]``), and to end a sentence.
    """
    part = part.strip()
    if len(part) >= _LONG_CHARS or part not in text:
        return part in text
    end = r"[ \t]*(?:$|[\n<\[。]|[.!?](?!\w))" if _WORD_END.search(part) else ""
    # white space of one line: of several a search would be quadratic
    return re.search(rf"(?:^|[\n>\]]|:\s)[ \t]*{re.escape(part)}{end}", text) is not None


# --- what stands before it ------------------------------------------------------------------------


def framed(
    row: Mapping[str, Any], items: Sequence[Candidate | Rating], *, history: bool = True
) -> Sequence[Candidate | Rating]:
    """The pairs of a row with its ``system`` message and its ``history`` before their prompt.

    A prompt that is one text becomes a user's message, but a dialogue in a text gets them as turns
    of its own form. What the prompt has already is not said twice.

    Args:
        row: The row, or the part with its texts.
        items: What a parser made of it.
        history: Whether the field of that name has earlier turns (in SHP it is the prompt).

    Raises:
        RowError: they cannot be read, or do not fit before the prompt.
    """
    if _BEFORE.isdisjoint(row):
        return items
    system, turns = _system(row), _history(row) if history else ()
    if not system and not turns:
        return items
    return [_framed(item, system, turns) for item in items]


def _framed(item: Candidate | Rating, system: str, turns: Messages) -> Candidate | Rating:
    if item.messages:
        prompt = _before(item.messages, system, turns)
        check_order(prompt, "prompt")
        return item._replace(prompt=as_text(prompt), messages=prompt)
    if _repeats(item.prompt, system):
        system = ""
    start = _before((), system, turns)
    if not start:
        return item
    if _DIALOGUE.search(item.prompt):
        prompt_text = item.prompt if item.prompt.startswith("\n") else f"\n\n{item.prompt}"
        return item._replace(prompt=turns_as_text(start) + prompt_text)
    prompt = (*start, Message("user", item.prompt))
    if isinstance(item, Rating):
        check_order(prompt, "prompt")
        return item._replace(prompt=as_text(prompt), messages=prompt)
    target = item.sft_target and f" {item.sft_target.strip()}"
    found = candidate(prompt, item.chosen, item.rejected, split=item.split)
    return found._replace(sft_target=target)


def _before(prompt: Messages, system: str, turns: Messages) -> Messages:
    own, rest = (prompt[:1], prompt[1:]) if prompt and prompt[0].role == "system" else ((), prompt)
    if rest[: len(turns)] != turns:
        rest = (*turns, *rest)
    if not own and system and not (rest and rest[0].role == "system"):
        own = (Message("system", system),)
    return (*own, *rest)


def _system(row: Mapping[str, Any]) -> str:
    for name in SYSTEMS:
        value = row.get(name)
        if isinstance(value, str) and not is_nothing(value):
            return value
        if isinstance(value, list | Mapping) and value:
            raise RowError("wrong_type", f"{name} must be a text", name)
    return ""


def _history(row: Mapping[str, Any]) -> Messages:
    value = row.get(HISTORY)
    if not isinstance(value, str | list | Mapping) or not value:
        return ()
    if isinstance(value, str):
        prompt = row.get("prompt")
        if is_nothing(value) or (isinstance(prompt, str) and _repeats(prompt, value)):
            return ()
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            value = {"text": value}
    if isinstance(value, list) and all(map(is_message, value)):
        return read_messages(value, HISTORY)
    turns: list[Message] = []
    for pair in value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError(
                "wrong_type",
                f"{HISTORY} must be the earlier turns, [[question, answer], ...], or messages",
                HISTORY,
            )
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return tuple(turns)


# --- rows without a known name --------------------------------------------------------------------

_NOTES = re.compile(
    r"reason|rationale|expla|critique|feedback|comment|note|justif|analysis|annotat|judg|"
    r"meta|chosen|reject|prefer|score|rating|license|url|path"
)
_LABELS = re.compile(
    r"(^|[ _.-])(id|ids|uid|uuid|source|src|category|model|models|domain|topic|task|type|kind|lang|"
    r"language|date|time|timestamp|created|updated|dataset|subset|name|author|worker|tag|tags|"
    r"label|labels|version|origin|subject|hash|status|difficulty|style|subreddit|generator|index|"
    r"split|group|set|file|principle|locale|country|skill)($|[ _.-])"
)
_LABEL_WORDS = 6


def refuse_unread_question(row: Mapping[str, Any]) -> None:
    """Of texts without a prompt, no other field may hold the question that they answer.

    What both begin with would then be trained on as the prompt, and it is the answers' beginning.
    Fields that say something of the pair, by their names, are no questions: notes of any length
    (``rationale``, ``feedback``), and labels of a few words (``source``, ``category``, ``model``).

    Raises:
        RowError: one may be the question; it is named.
    """
    start = str(row.get("chosen", "")), str(row.get("rejected", ""))
    for name, value in row.items():
        if name in ("prompt", "chosen", "rejected", "split", "sft_target"):
            continue
        if isinstance(value, list):
            suspect = bool(value) and all(map(is_message, value))
        else:
            suspect = isinstance(value, str) and _may_ask(str(name).lower(), value, start)
        if suspect:
            raise RowError(
                "unknown_format",
                f"there is no prompt, and the field {name} may hold the question: name it prompt, "
                "or leave it out where chosen and rejected begin with the question themselves",
                str(name),
            )


def _may_ask(name: str, value: str, answers: tuple[str, str]) -> bool:
    words = value.split()
    if len(words) < 2 or _NOTES.search(name) or all(value.strip() in text for text in answers):
        return False
    return len(words) > _LABEL_WORDS or "?" in value or not _LABELS.search(name)
