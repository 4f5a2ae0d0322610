"""Functions of the user's own: for a row, and the reference code's form of a whole set."""

from pathlib import Path

import pytest

from dpo.data.quarantine import NOT_FAULTY
from dpo.errors import ConfigError, DataError
from tests.data.conftest import Ingest

CUSTOM = """
def mine(row):
    if row["q"] == "two":
        return [{"prompt": "two", "chosen": a, "rejected": "z"} for a in row["good"]]
    return {"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"]}

def whole(split, silent=False, cache_dir=None):
    number = {"train": 1, "test": 2}[split]
    return {
        f"q{number}": {
            "responses": ["a", "b", "c"],
            "pairs": [(0, 1), (2, 1)],
            "sft_target": "c",
        }
    }

def with_unpaired(split, silent=False, cache_dir=None):
    alone = {"responses": ["d"], "pairs": [], "sft_target": "d"}
    both = {"responses": ["d", "e"], "pairs": [], "sft_target": "d"}
    many = {"responses": [str(n) for n in range(65)], "pairs": [], "sft_target": "0"}
    found = {f"alone {split}": alone, f"both {split}": both, f"many {split}": many}
    return {**whole(split), **found}

def half(split, silent=False, cache_dir=None):
    cut = {"responses": ["a", "b\\ud83d"], "pairs": [(0, 1)], "sft_target": "a"}
    return {**whole(split), f"cut {split}": cut}

def no_text(split, silent=False, cache_dir=None):
    return {"q": {"responses": [b"a", b"b"], "pairs": [(0, 1)], "sft_target": "a"}}

def broken(split, silent=False, cache_dir=None):
    return ["no mapping"]
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"custom_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_of_ones_own_reads_rows(ingest: Ingest, custom: str) -> None:
    rows = [
        {"q": "one", "good": "a", "bad": "b"},
        {"q": "two", "good": ["c", "d"]},
        {"q": "three", "good": 4, "bad": "b"},
        {"other": 1},
    ]
    found = ingest(rows, {"format": f"{custom}:mine"})
    assert [(pair["prompt"], pair["chosen"]) for pair in found.pairs] == [
        ("one", "a"),
        ("two", "c"),
        ("two", "d"),
    ]
    assert [(line["reason"], line["line"]) for line in found.quarantine] == [
        ("wrong_type", 3),
        ("custom_format_failed", 4),
    ]
    assert "KeyError" in found.quarantine[1]["advice"]
    with pytest.raises(ConfigError, match="cannot be had"):
        ingest(rows, {"format": f"{custom}:none"})


def test_a_mended_quarantine_of_a_format_of_ones_own(ingest: Ingest, custom: str) -> None:
    source = {"format": f"{custom}:mine"}
    (line,) = ingest([{"q": "one", "good": "a", "bad": ""}], source).quarantine
    assert ingest([line], source).reasons == ["empty"]
    line["row"]["bad"] = "b"
    again = ingest([{**line, "split": "test"}], source)
    assert [(pair["rejected"], pair["split"]) for pair in again.pairs] == [("b", "test")]


def test_the_reference_codes_form_is_accepted(ingest_sources: Ingest, custom: str) -> None:
    found = ingest_sources({"mine": {"loader": f"{custom}:whole"}})
    assert [
        (p["prompt"], p["chosen"], p["rejected"], p["sft_target"], p["split"]) for p in found.pairs
    ] == [
        ("q1", "a", "b", "c", "train"),
        ("q1", "c", "b", "c", "train"),
        ("q2", "a", "b", "c", "test"),
        ("q2", "c", "b", "c", "test"),
    ]
    found = ingest_sources({"mine": {"loader": f"{custom}:with_unpaired"}})
    assert len(found.pairs) == 4
    assert found.reasons == ["no_pair"] * 6
    assert "no pair of answers" in found.quarantine[0]["advice"]
    assert not {"score", "scores"} & found.quarantine[0]["row"].keys()
    assert "no_pair" in NOT_FAULTY
    with pytest.raises(DataError, match="broken failed: AttributeError"):
        ingest_sources({"mine": {"loader": f"{custom}:broken"}})


def test_what_a_loader_gives_and_no_file_can_hold(ingest_sources: Ingest, custom: str) -> None:
    """Seen: both ended in a traceback."""
    found = ingest_sources({"mine": {"loader": f"{custom}:half"}})
    assert len(found.pairs) == 4
    assert [item["row"].count("cut ") for item in found.quarantine] == [1, 1]
    with pytest.raises(DataError, match=r"no_text gives a value that is no text: .*bytes") as error:
        ingest_sources({"mine": {"loader": f"{custom}:no_text"}})
    assert error.value.where == "sources.mine.loader, split train"
