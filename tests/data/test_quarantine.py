"""A quarantine file is a source like any other: what is mended in it is read again."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import Ingest, good_row

ASKED = {"role": "user", "content": "p"}
DELETED = {"role": "assistant", "content": "[deleted]"}


def test_a_mended_quarantine_is_a_source(ingest: Ingest, tmp_path: Path) -> None:
    found = ingest([{"prompt": "p", "chosen": "", "rejected": "r"}, good_row(1)])
    mended = [{**line, "row": {**line["row"], "chosen": "now there"}} for line in found.quarantine]
    again = ingest(mended)
    assert [pair["chosen"] for pair in again.pairs] == ["now there"]
    assert again.quarantine == []


def test_rejected_repeats_can_be_fed_in_again(ingest: Ingest) -> None:
    turns = [{"role": "user", "content": "p"}]
    found = ingest(
        [
            {"prompt": turns, "chosen": "a", "rejected": "b"},
            {"prompt": turns, "chosen": "b", "rejected": "a"},
        ]
    )
    again = ingest(found.quarantine[:1])
    assert (again.pairs[0]["chosen"], again.pairs[0]["prompt_messages"]) == (" a", turns)


def test_a_row_of_a_table_with_a_comma_too_many_can_be_mended(
    ingest: Ingest, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("prompt,chosen,rejected\nWhy, then?,yes,no\n")
    found = ingest([], {"path": str(path)})
    again = ingest(found.quarantine)
    assert [line["reason"] for line in again.quarantine] == ["unreadable"]
    assert "4 fields where the header has 3" in again.quarantine[0]["advice"]
    line = found.quarantine[0]
    fields = line["row"]["fields"]
    line["row"]["fields"] = [",".join(fields[:2]), *fields[2:]]
    assert [pair["prompt"] for pair in ingest([line]).pairs] == ["Why, then?"]


def test_an_equal_key_stays_wrong_in_the_quarantine(ingest: Ingest, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text('{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "r"}\n')
    again = ingest(ingest([], {"path": str(path)}).quarantine)
    assert "stands there twice" in again.quarantine[0]["advice"]


def test_repeats_of_a_source_with_a_format_can_be_fed_in_again(ingest: Ingest) -> None:
    """They are kept as pairs, whatever they were made of."""
    rated = {"prompt": "p", "responses": ["a", "b"], "scores": [2, 1]}
    found = ingest([rated, rated], {"format": "ranked"})
    assert found.reasons == ["duplicate_pair"]
    again = ingest(found.quarantine, {"format": "ranked"})
    assert [(pair["chosen"], pair["rejected"]) for pair in again.pairs] == [("a", "b")]


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        ({"prompt": "p", "response": "[deleted]", "label": True}, "response", "[deleted]"),
        ({"messages": [ASKED, DELETED], "label": True}, "messages", "[deleted]"),
        ({"prompt": "p", "response_a": "a", "response_b": "a", "winner": "a"}, "rejected", "a"),
        ({"prompt": "p", "responses": ["a", "a "], "scores": [2, 1]}, "rejected", "a "),
        ({"prompt": "p", "completion": "[deleted]", "label": True}, "completion", "[deleted]"),
    ],
)
def test_the_text_at_fault_is_named_and_shown(
    ingest: Ingest, row: dict[str, Any], field: str, value: str
) -> None:
    found = ingest([row])
    assert [(line["field"], line["value"]) for line in found.quarantine] == [(field, value)]


def test_rated_answers_that_are_equal_are_shown(ingest: Ingest) -> None:
    rated = {"prompt": "p", "completion": "a"}
    found = ingest([{**rated, "score": 1}, {**rated, "score": 2}])
    assert [(line["reason"], line["value"]) for line in found.quarantine] == [
        ("chosen_equals_rejected", "a")
    ]
