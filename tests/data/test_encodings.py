"""Text in other encodings is refused, with the byte, what it looks like and how to convert it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.data.encodings import not_utf8
from dpo.data.readers import rows
from dpo.errors import DataError
from tests.data.conftest import Outcome, good_row

WINDOWS = "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"


@pytest.mark.parametrize(
    ("data", "first", "looks"),
    [
        (
            "a caf\u00e9".encode("latin-1"),
            "byte 0xe9 at position 6",
            "like Latin-1 or Windows-1252",
        ),
        ("it\u2019s".encode("cp1252"), "byte 0x92 at position 3", "like Windows-1252, where that"),
        (
            "\u65e5\u672c\u306e\u9996\u90fd".encode("shift_jis"),
            "byte 0x93 at position 1",
            "no encoding of",
        ),
        (b"cut \xe2\x82", "byte 0xe2 at position 5", "Windows-1252"),
    ],
)
def test_what_bytes_look_like(data: bytes, first: str, looks: str) -> None:
    found = not_utf8(data)
    assert found.startswith(first)
    assert looks in found


def test_a_csv_of_windows(tmp_path: Path, ingest_sources: Callable[..., Outcome]) -> None:
    text = "prompt,chosen,rejected\nCaf\u00e9?,Yes,No\nPlain?,Yes,No\nPlain 2?,Yes,No\n"
    path = tmp_path / "win.csv"
    path.write_bytes(text.encode("cp1252"))
    good = tmp_path / "good.jsonl"
    good.write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", "split": "test"}\n'
        '{"prompt": "d", "chosen": "b", "rejected": "c", "split": "train"}\n'
    )
    sources = {"win": {"path": str(path)}, "good": {"path": str(good)}}
    found = ingest_sources(sources)
    assert len(found.quarantine) == 1
    line = found.quarantine[0]
    assert (line["line"], line["reason"], line["field"]) == (2, "broken_encoding", "prompt")
    assert line["advice"].startswith("prompt: byte 0xe9 at position 4 is not UTF-8")
    assert WINDOWS in line["advice"]


def test_a_document_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes('[{"a": 1},\n {"a": "caf\u00e9"}]'.encode("latin-1"))
    with pytest.raises(DataError, match="byte 0xe9 at position 12 is not UTF-8") as caught:
        list(rows(path, "x.json"))
    assert "x.json, line 2" in str(caught.value)
    assert WINDOWS in str(caught.value)


GOOD = (
    '{"prompt": "a", "chosen": "b", "rejected": "c", "split": "test"}\n'
    '{"prompt": "d", "chosen": "b", "rejected": "c", "split": "train"}\n'
)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.csv", "pregunt\u00f3,buena,mala\nq,a,b\n".encode("latin-1")),
        ("x.json", b'[{"\\ud800k": 1, "prompt": "p"}]'),
        ("x.jsonl", b'{"prompt": "\\ud800p", "chosen": "c", "rejected": "r"}\n'),
    ],
)
def test_half_characters_reach_no_report(
    tmp_path: Path, ingest_sources: Callable[..., Outcome], name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.jsonl").write_text(GOOD)
    sources = {
        "bad": {"path": str(tmp_path / name)},
        "good": {"path": str(tmp_path / "good.jsonl")},
    }
    found = ingest_sources(sources, bad_rows="drop")
    assert (len(found.pairs), len(found.quarantine)) == (2, 1)
    (told,) = found.report["examples"][found.reasons[0]]
    assert told.startswith(f"bad: {name}, line ")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it\u2019s", "\u00e2\u20ac\u2122"),
        ("\u201cyes\u201c", "\u00e2\u20ac\u0153"),
        ("one \u2014 two", "\u00e2\u20ac\u201d"),
        ("wait\u2026", "\u00e2\u20ac\u00a6"),
        ("caf\u00e9", "\u00c3\u00a9"),
        ("\u00fcber", "\u00c3\u00bc"),
    ],
)
def test_utf8_that_was_read_as_windows_1252_is_refused(
    ingest: Callable[..., Outcome], text: str, found: str
) -> None:
    misread = text.encode().decode("cp1252")
    rows = [good_row(number) for number in range(40)]
    rows[7]["chosen"], rows[8]["rejected"] = misread, text
    (line,) = ingest(rows).quarantine
    assert (line["line"], line["reason"]) == (8, "broken_encoding")
    assert found in line["advice"]


def test_words_that_end_in_such_a_letter_are_not(ingest: Callable[..., Outcome]) -> None:
    rows = [good_row(n) for n in range(40)]
    rows[3]["chosen"] = (
        "\u00abAMANH\u00c3\u00bb, AMANH\u00c3\u00a0\u00e9 L\u00c2 \u20ac 5, \u00e2 S\u00c3O"
    )
    assert ingest(rows).quarantine == []


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_check_prints_what_every_terminal_can_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    path = tmp_path / "v.csv"
    path.write_bytes("prompt,chosen,rejected\nq,caf\u00e9,b\n".encode("latin-1"))
    # capsys refuses what is not UTF-8, as a strict terminal does
    assert main(["ingest", "--check", str(path), "--output", output]) == 1
    text = capsys.readouterr().out
    if output == "text":
        assert "caf\ufffd" in text
    assert "byte 0xe9 at position 4 is not UTF-8" in text
    if output == "json":
        (place,) = json.loads(text)["reasons"]["broken_encoding"]["places"]
        assert place["value"] == "caf\ufffd"
