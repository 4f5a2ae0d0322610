"""Which parser reads a row: by the source's ``format``, or by the row's own keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from dpo.config.sources import SourceConfig
from dpo.data import annotated, compared, custom, formats, shapes, trees
from dpo.data.fields import named_texts, opened, plain_name
from dpo.data.formats import ASSISTANT, Candidate, Parser, Rating, RowError, split_field
from dpo.data.lines import json_row
from dpo.data.media import MEDIA, TOOLS, refuse_media
from dpo.data.prompts import HISTORY, PROMPTS, SYSTEMS, framed, refuse_unread_question
from dpo.data.quarantine import row_of_fields
from dpo.data.repeats import REASONS
from dpo.data.verdicts import (
    UNACCEPTED,
    VERDICTS,
    answer_groups,
    answer_names,
    named_answers,
    refuse_unclear,
)


def _common_text(row: Mapping[str, Any]) -> Sequence[Candidate]:
    refuse_unread_question(row)
    return formats.common_text(row)


PARSERS: Mapping[str, Parser] = {
    "pairs": formats.pairs,
    "novalto": formats.pairs,
    "hh": formats.hh,
    "shp": formats.shp,
    "se": shapes.se,
    "messages": shapes.messages,
    "openai": shapes.openai,
    "ranked": shapes.ranked,
    "rated": shapes.rated,
    "compared": compared.compared,
    "summaries": compared.summaries,
    "argilla": annotated.argilla,
    "labelstudio": annotated.label_studio,
}
"""By ``sources.NAME.format``."""
_BY_SHAPE: Mapping[str, Parser] = {
    "asked": compared.asked,
    "exported": annotated.exported,
    "common_text": _common_text,
    "tree": trees.tree,
    "rated_summary": compared.rated_summary,
}
"""Told by a row's keys and values only."""
_ALIASES = {
    **{f"chosen_{word}": "chosen" for word in ("response", "answer", "text", "completion")},
    **{f"rejected_{word}": "rejected" for word in ("response", "answer", "text", "completion")},
    **{"response_chosen": "chosen", "response_rejected": "rejected"},
    # StackLLaMA's
    **{"response_j": "chosen", "response_k": "rejected"},
    # LLaMA-Factory's
    "kto_tag": "label",
}

_SCORED = frozenset({"label", "score", "rating", "helpfulness"})
_NAMES = frozenset(
    {
        *("prompt", "chosen", "rejected", "sft_target", "split"),
        *(*shapes.DIALOGUES, "scores", "ratings", "ranks", *shapes.ANSWER_LISTS, *_SCORED),
        *(*PROMPTS, *SYSTEMS, HISTORY, *VERDICTS, *MEDIA, TOOLS, *shapes.ANSWER_TEXTS),
    }
)
"""Fields that have one meaning in every format; ``chosen`` may name none of them."""
_PASSED_OVER = frozenset(
    {"prompt", "chosen", "rejected", "sft_target", "split", *SYSTEMS, HISTORY, *MEDIA, TOOLS}
)
"""Fields that a row is read without, or of which one would do for both."""
_ALIAS = 2
"""How far from a name its aliases are."""

_PRODIGY = ("_input_hash", "_task_hash")

_QUARANTINE_KEYS = {"reason", "advice", "row"}


def parser_of(source: SourceConfig) -> Parser:
    """What reads the rows of a source."""
    if ":" in source.format:
        return partial(_parse_custom, parse=custom.row_parser(source.format))
    shp: Parser = partial(formats.shp, min_score_ratio=source.min_score_ratio)
    parsers = {**PARSERS, **_BY_SHAPE, "shp": shp}
    return partial(_parse, parsers=parsers, format_name=source.format)


def _refuse_unaccepted(row: Mapping[str, Any]) -> None:
    """An example that the annotator of Prodigy's refused or passed over, whatever else it says.

    Raises:
        RowError: ``answer`` says so, and is not an answer itself.
    """
    said = row.get("answer")
    if said not in UNACCEPTED:
        return
    judged = row.keys() >= {"chosen", "rejected"} or any(
        row.get(name) is not None for name in VERDICTS
    )
    if any(row.get(name) is not None for name in _PRODIGY) or (
        judged and said not in _answers(row)
    ):
        raise RowError(
            "not_accepted",
            f"answer is {said}, by which Prodigy marks an example without a verdict: leave the "
            "field out where it says something else",
            "answer",
        )


def _answers(row: Mapping[str, Any]) -> list[str | None]:
    """The texts that a row has for answers, wherever they stand."""
    values = [row.get(name) for name in ("chosen", "rejected", *answer_names(row))]
    for name in shapes.ANSWER_LISTS:
        values += row[name] if isinstance(row.get(name), list) else []
    return list(map(shapes.text_of, values))


def _parse_custom(row: Any, *, parse: Parser) -> Sequence[Candidate | Rating]:
    if _is_quarantined(row):
        return _mended(row, parse)
    return parse(row)


def _is_quarantined(row: Any) -> bool:
    return isinstance(row, Mapping) and "reason" in row and row.keys() >= _QUARANTINE_KEYS


def _parse(
    row: Any, *, parsers: Mapping[str, Parser], format_name: str
) -> Sequence[Candidate | Rating]:
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise RowError("wrong_type", f"expected an object with fields, found a {kind}")
    if _is_quarantined(row):
        return _mended(row, partial(_parse, parsers=parsers, format_name=format_name))
    row = named_answers(named_texts(opened(renamed(row))))
    refuse_media(row)
    _refuse_unaccepted(row)
    found = detect(row) if format_name == "auto" else _by_values(format_name, row)
    if found is None:
        keys = ", ".join(map(str, list(row)[:8])) or "no fields"
        refuse_unclear(row)
        if names := answer_names(row):
            raise RowError(
                "unknown_format",
                f"{' and '.join(names)} are answers, and no field that is known says which is "
                f"better: name it winner, with the better one's name or a tie in it; found {keys}",
            )
        if row.keys() & {"messages", "conversations"}:
            # what a model is tuned with before it learns preferences
            keys += " (a dialogue without a second answer says nothing about what is preferred)"
        raise RowError(
            "unknown_format",
            f"no known format has these fields: {keys}; use prompt, chosen and rejected, or set "
            "the source's format",
        )
    items = parsers[found](row)
    if row.get("sft_target") is not None and found not in ("pairs", "novalto"):
        items = shapes.with_target(row, items)
    # SHP's history is its prompt
    return framed(row, items, history=found != "shp")


def _mended(line: Mapping[str, Any], parse: Parser) -> Sequence[Candidate | Rating]:
    """The row in a line of a quarantine file, which a person has mended."""
    row = line["row"]
    if isinstance(row, str):
        # a row that could not be read stands there as its text
        found = json_row(row.encode("utf-8", "surrogatepass"), "", 0)
        if found.problem:
            raise RowError("unreadable", f"row is {found.problem}", "row")
        row = found.value
    row = row_of_fields(row)
    if line["reason"] in REASONS:
        # what collides with other pairs stands there as a pair, whatever it was made of
        parse = partial(_parse, parsers=PARSERS, format_name="auto")
    split = split_field(line)
    return [item if item.split else item._replace(split=split) for item in parse(row)]


def _by_values(format_name: str, row: Mapping[str, Any]) -> str:
    """Plain pairs may hold message lists as well."""
    if format_name in ("pairs", "novalto") and _has_messages(row):
        return "messages"
    return format_name


def renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose ``Prompt``, ``Split ``, ``System`` or ``Chosen Response`` have the names that are
    read.

    Of several fields for one name the name itself counts before the same in other letters, and this
    before an alias. Blank ones give way; two that are equally near and differ keep their names.

    Raises:
        RowError: two differ of which one would be passed over in silence, such as the split.
    """
    if row.keys() <= _NAMES:
        return row
    found: dict[str, list[tuple[int, Any]]] = {}
    for key in row:
        plain = plain_name(str(key))
        name = _ALIASES.get(plain, plain)
        if name in _NAMES:
            found.setdefault(name, []).append(((key != name) + (plain != name), key))
    keys = {_nearest(row, name, fields): name for name, fields in found.items()}
    names = {key: name for key, name in keys.items() if key not in (None, name)}
    given_way = set(names.values())
    return {names.get(key, key): row[key] for key in row if key not in given_way}


def _nearest(row: Mapping[str, Any], name: str, fields: Sequence[tuple[int, Any]]) -> Any:
    """Which of the fields counts, given with how far their names are from this one; None: none."""
    said = [(far, key) for far, key in fields if not _is_blank(row[key])]
    if not said:
        return fields[0][1] if len(fields) == 1 else None
    same = [key for far, key in said if far < _ALIAS]
    if name in _PASSED_OVER and any(row[key] != row[same[0]] for key in same):
        raise RowError(
            "unknown_format",
            f"{' and '.join(map(str, same))} are one name with different values: leave one out",
            str(same[-1]),
        )
    nearest = [key for far, key in said if far == min(said)[0]]
    return nearest[0] if all(row[key] == row[nearest[0]] for key in nearest) else None


def _is_blank(value: Any) -> bool:
    # NaN stands for nothing in tables
    return value is None or value != value or (isinstance(value, str) and not value.strip())


_FITS: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "tree": trees.is_tree,
    "exported": lambda row: bool(answer_groups(row)) and annotated.is_exported(row),
    "compared": compared.is_compared,
    "rated_summary": compared.is_rated_summary,
}
"""Whether a row has a format, where its keys alone do not tell; the first that fits counts."""


def detect(row: Mapping[str, Any]) -> str | None:
    """The format of a row by its keys; None when no format fits."""
    keys = {key for key, value in row.items() if value is not None}
    if keys >= {"chosen", "rejected"}:
        if _has_messages(row) or keys & {"messages", "conversations", "conversation"}:
            return "messages"
        return "pairs" if "prompt" in row else _without_prompt(row, keys)
    for name, fits in _FITS.items():
        if fits(row):
            return name
    for name, needed in (
        ("argilla", {"fields", "responses"}),
        ("labelstudio", {"data", "annotations"}),
        ("summaries", {"info", "summaries", "choice"}),
        ("openai", {"input", "preferred_output", "non_preferred_output"}),
        ("shp", {"history", "human_ref_A", "human_ref_B"}),
        ("se", {"question", "answers"}),
    ):
        if keys >= needed:
            return name
    if keys & _SCORED and any(isinstance(row.get(key), list) for key in shapes.DIALOGUES):
        return "rated"
    if not keys & _ASKED:
        return None
    return _by_answers(keys) or ("exported" if annotated.is_exported(row) else None)


def _by_answers(keys: set[str]) -> str | None:
    if keys & {"responses", "completions", "answers", "candidates", "generations"}:
        return "ranked"
    if keys & {"chosen", "rejected"}:
        # an answer is missing: the parser names it
        return "pairs" if "prompt" in keys else "asked"
    if keys & {"completion", "response"} and keys & _SCORED:
        return "rated"
    return None


_QUESTIONS = frozenset({"question", "instruction", "input", "query"})
_ASKED = frozenset({"prompt", "instruction", "question", "problem", "query", "user_prompt"})
_TEXT_QUESTIONS = frozenset(PROMPTS) - _QUESTIONS - {"prompt"}


def _without_prompt(row: Mapping[str, Any], keys: set[str]) -> str:
    marked = [ASSISTANT in str(row[name]) for name in ("chosen", "rejected")]
    if any(marked):
        return "hh"
    # of other kinds these are no questions
    texts = any(isinstance(row[name], str | list) for name in keys & _TEXT_QUESTIONS)
    return "asked" if texts or keys & _QUESTIONS else "common_text"


def _has_messages(row: Mapping[str, Any]) -> bool:
    return any(isinstance(row.get(key), list | dict) for key in ("prompt", "chosen", "rejected"))
