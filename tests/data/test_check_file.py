"""The tools for people who keep data: toy data, and a check with an exit code."""

import json
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.data import toy


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(place: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["ingest", "--check", place, *more])
    return code, capsys.readouterr().out


def test_toy_data_are_sound_and_found(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy.main()
    code, text = check("toy-data/community.json", capsys)
    assert code == 0
    assert text == (
        "toy-data/community.json: 80 rows, 80 pairs can be used.\n\nNothing is wrong.\n"
    )
    assert main(["ingest", "datasets=[novalto]", "model=tiny", "output=out"]) == 0
    assert (in_tmp / "out" / "manifest.json").is_file()


def test_what_is_wrong_in_words(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = toy.toy_rows()
    rows[3]["chosen"] = " "
    rows[5].pop("rejected")
    rows[7] = rows[6]
    # one row a line; the first stands in line 1
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{oops\n")
    code, text = check("mine.jsonl", capsys)
    assert code == 1
    assert text.startswith("mine.jsonl: 81 rows, 77 pairs can be used.\n\nTo mend: 3 rows\n")
    assert "  A text is empty (empty): 1 row\n    mine.jsonl, line 4: chosen is empty." in text
    assert "mine.jsonl, line 6: the field rejected is missing." in text
    assert "Sound, but not needed: 1 row" in text
    assert "  The same pair stands there before (duplicate_pair): 1 row" in text
    assert text.endswith("Mend these rows in the file and check it again.\n")
    assert "mine.jsonl, line 81: not JSON" in text


def test_json_is_the_last_line(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text(json.dumps([*toy.toy_rows(), {"prompt": "p", "chosen": 3}]))
    code, text = check("mine.json", capsys, "--output", "json")
    assert code == 1
    found = json.loads(text.splitlines()[-1])
    assert (found["rows"], found["accepted"], found["rejected"]) == (81, 80, 1)
    (place,) = found["reasons"]["wrong_type"]["places"]
    assert (place["file"], place["field"], place["value"]) == ("mine.json", "chosen", "3")


def test_duplicates_alone_are_no_fault(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text(json.dumps(toy.toy_rows() * 2))
    code, text = check("mine.json", capsys)
    assert code == 0
    assert "(duplicate_pair): 80 rows" in text
    assert "... and 75 more" in text


def test_a_file_without_a_single_pair_is_wrong(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.jsonl").write_text('{"prompt": "p", "completion": "c", "score": 1}\n')
    code, text = check("mine.jsonl", capsys)
    assert code == 1
    assert "(one_answer): 1 row" in text
    assert text.endswith("No row gives a pair: there is nothing to train on in this file.\n")


def test_a_file_that_cannot_be_read(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text("[1, 2")
    assert main(["ingest", "--check", "mine.json"]) == 1
    assert "not JSON" in capsys.readouterr().err
    code, text = check("mine.json", capsys, "--output", "json")
    assert code == 1
    found = json.loads(text)
    assert not found["readable"]
    assert "mine.json, line 1" in found["problem"]
    assert main(["ingest", "--check", "none.json"]) == 1


def test_odd_file_names(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a, b [c]=d.json", "ünï code.json"):
        Path(name).write_text(json.dumps(toy.toy_rows()))
        assert check(name, capsys)[0] == 0
