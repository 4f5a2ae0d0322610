"""Two answers that nobody can tell apart are no preference; what anyone sees is one."""

import unicodedata
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.alike import alike_rows, look_alike
from tests.data.conftest import Outcome, good_row

LONG = "word " * 100
ALIKE = [
    ("yes", "yes"),
    ("yes", "y\u200bes"),
    ("yes", "\ufeffyes\u2060"),
    ("soft", "so\u00adft"),
    ("a\u200db", "ab"),
    ("caf\u00e9", "cafe\u0301"),
    ("\u00c5ngstr\u00f6m", "\u212bngstro\u0308m"),
    ("\ud55c\uae00", "\u1112\u1161\u11ab\u1100\u1173\u11af"),
    ("two  words", "two words"),
    ("two\u00a0words", "two\twords"),
    ("a line \nnext", "a line\nnext"),
    ("a line\r\nnext", "a line\nnext"),
    ("a\u00a0line\nthe\u3000next", "a line\nthe next"),
    ("\u200b\ntwo  words", "two words"),
    ("\u202ayes\u202c", "yes"),
    (f"{LONG}end", f"{LONG} end"),
    (f"{LONG}\u200b{LONG}end", f"{LONG}{LONG}end"),
]
UNLIKE = [
    ("yes", "no"),
    ("yes", "Yes"),
    ("yes", "yes."),
    ("cafe", "caf\u00e9"),
    ("one\n\ntwo", "one\ntwo"),
    ("one two", "one\ntwo"),
    ("one two", "onetwo"),
    ("if x:\n    y", "if x:\ny"),
    ("if x:\n    y", "if x:\n\ty"),
    # tables
    ("id   name\n1    Bob\n22   Al", "id name\n1 Bob\n22 Al"),
    ("a\tb\n1\t2", "a b\n1 2"),
    # letters that are joined or not, and one emoji or two
    (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645",
    ),
    ("\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"),
    ("\u4f60\u597d", "\u60a8\u597d"),
    (f"{LONG}a", f"{LONG}b"),
    (f"a{LONG}", f"b{LONG}"),
]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(*pair, True) for pair in ALIKE] + [(*pair, False) for pair in UNLIKE],
)
def test_what_looks_the_same(one: str, other: str, expected: bool) -> None:
    assert look_alike(one, other) is look_alike(other, one) is expected


def test_columns_say_the_same() -> None:
    chosen, rejected = map(list, zip(*ALIKE, *UNLIKE, ("", ""), ("", "x"), strict=True))
    expected = [*range(len(ALIKE)), len(ALIKE) + len(UNLIKE)]
    assert alike_rows(pa.array(chosen), pa.array(rejected)) == expected
    shorter = [column.slice(1) for column in (pa.array(["x", *chosen]), pa.array(["y", *rejected]))]
    assert alike_rows(*shorter) == expected
    assert alike_rows(pa.array(["x y", None, "a"]), pa.array(["x  y", "b", None])) == [0]
    assert alike_rows(pa.array([], pa.string()), pa.array([], pa.string())) == []


def words_and_gaps(line: str) -> list[str]:
    return ["\t" if char == "\t" else "gap" if char.isspace() else char for char in line.strip()]


def seen(text: str) -> list[tuple[str, list[str]]]:
    """An account of its own: lines with their indentation and words, accents apart.

    Of several lines the words are characters, with the gaps among them.
    """
    kept = "".join(char for char in text if char not in "\u00ad\u200b\u2060\ufeff")
    lines = unicodedata.normalize("NFD", kept).strip().split("\n")
    parts = str.split if len(lines) == 1 else words_and_gaps
    pairs = [(line[: len(line) - len(line.lstrip())], parts(line)) for line in lines]
    return [(indent if words else "", words) for indent, words in pairs]


TEXT = st.text(
    "aeAE\u00e9\u0301\u0323\u1e65s\u0307 \n\t\u00a0\u200b\ufeff\u00ad\u1112\u1161\ud558.",
    max_size=6,
)


@given(TEXT, TEXT, TEXT, TEXT)
@settings(deadline=None, max_examples=300)
def test_the_short_cuts_leave_nothing_out(start: str, one: str, other: str, end: str) -> None:
    texts = f"{start}{one}{end}".strip(), f"{start}{other}{end}".strip()
    expected = seen(texts[0]) == seen(texts[1])
    assert look_alike(*texts) is expected
    assert alike_rows(*(pa.array([text]) for text in texts)) == [0] * expected


def test_such_a_pair_is_rejected(ingest: Callable[..., Outcome]) -> None:
    def row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = [*map(good_row, range(40)), row("p", "a\u200bb", "ab"), row("q", "if:\n  a", "if:\na")]
    found = ingest(rows)
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [
        (41, "chosen_equals_rejected")
    ]
    assert "look the same" in found.quarantine[0]["advice"]
    asked = [{"role": "user", "content": "Hi?"}]
    assert ingest([{**row("", "a  b", "a b"), "prompt": asked}]).reasons == [
        "chosen_equals_rejected"
    ]
