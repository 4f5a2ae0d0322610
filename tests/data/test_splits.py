"""Which split the files of a source are: by name, by folder, and beside other sources."""

import json
from collections.abc import Callable
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pyarrow as pa
import pytest

from dpo.config.sources import SourceConfig
from dpo.data import sources
from dpo.data.sources import opened, source_fingerprint
from dpo.data.splits import own_split
from tests.data.conftest import Outcome, good_row


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl.gz", "train"),
        ("validation-00000-of-00001.parquet", "test"),
        ("DEV.csv", "test"),
        ("trained.json", None),
        ("my_train.json", "train"),
        ("testimonials.json", None),
        ("v1.test.jsonl.zst", "test"),
        ("train/data-00000-of-00001.arrow", "train"),
        ("default/test/0000.parquet", "test"),
        ("test_prefs/0.parquet", "test"),
        ("test/train.jsonl", "train"),
        ("latest/data.jsonl", None),
    ],
)
def test_own_split(name: str, split: str | None) -> None:
    assert own_split(PurePath(name)) == split


def write(path: Path, numbers: range, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(good_row(n) | more) + "\n" for n in numbers))
    return path


def by_split(found: Outcome) -> dict[str, list[str]]:
    return {
        split: [pair["chosen"] for pair in found.pairs if pair["split"] == split]
        for split in ("train", "test")
    }


BY_FOLDER = {"train": [f"yes {n}" for n in range(9)], "test": ["yes 20", "yes 21"]}


def test_folders_state_splits(ingest_sources: Callable[..., Outcome], tmp_path: Path) -> None:
    """And what lies above the source does not."""
    root = tmp_path / "test" / "set"
    write(root / "train" / "0000.jsonl", range(9))
    write(root / "test" / "0000.jsonl", range(20, 22))
    for path in (root, f"{root}/*/*.jsonl"):
        found = ingest_sources({"set": {"path": str(path)}})
        assert by_split(found) == BY_FOLDER


def test_what_datasets_saves_keeps_its_splits(
    ingest_sources: Callable[..., Outcome], tmp_path: Path
) -> None:
    """As ``DatasetDict.save_to_disk`` lays it out."""
    for split, numbers in (("train", range(9)), ("test", range(20, 22))):
        table = pa.Table.from_pylist([good_row(number) for number in numbers])
        (tmp_path / "set" / split).mkdir(parents=True)
        path = tmp_path / "set" / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        for name in ("dataset_info.json", "state.json"):
            path.with_name(name).write_text("{}")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    found = ingest_sources({"set": {"path": str(tmp_path / "set")}})
    assert by_split(found) == BY_FOLDER
    assert not found.quarantine


def test_a_train_and_a_test_file_named_as_two_sources_are_one_set(
    ingest_sources: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "a": {"path": str(write(tmp_path / "a" / "train.jsonl", range(9)))},
        "c": {"path": str(write(tmp_path / "c" / "test.jsonl", range(20, 22)))},
    }
    assert by_split(ingest_sources(files)) == BY_FOLDER
    assert "splits of one set: a is train, c is test" in capsys.readouterr().err


def test_a_train_file_beside_a_set_with_splits_of_its_own_is_divided(
    ingest_sources: Callable[..., Outcome], tmp_path: Path
) -> None:
    """It is all there is of its set, as when it comes alone."""
    write(tmp_path / "whole" / "train.jsonl", range(50, 52))
    write(tmp_path / "whole" / "test.jsonl", range(60, 62))
    alone = write(tmp_path / "train.jsonl", range(40))
    found = ingest_sources(
        {"whole": {"path": str(tmp_path / "whole")}, "alone": {"path": str(alone)}},
        test_fraction=0.5,
    )
    assert {pair["split"] for pair in found.pairs if pair["dataset"] == "alone"} == {
        "train",
        "test",
    }


@pytest.mark.parametrize("word", ["dev", "val", "eval", "Test", "validation "])
def test_a_rows_own_word_for_the_test_split(
    ingest_sources: Callable[..., Outcome], tmp_path: Path, word: str
) -> None:
    write(tmp_path / "set" / "a.jsonl", range(9), split="Training")
    write(tmp_path / "set" / "b.jsonl", range(20, 22), split=word)
    assert by_split(ingest_sources({"set": {"path": str(tmp_path / "set")}})) == BY_FOLDER


def test_a_file_in_another_folder_is_another_set(tmp_path: Path) -> None:
    source = SourceConfig(path=str(tmp_path / "set"))
    path = write(tmp_path / "set" / "train" / "0.jsonl", range(3))
    before = source_fingerprint("set", source)
    path.parent.rename(tmp_path / "set" / "test")
    assert source_fingerprint("set", source) != before


def test_files_of_one_name_are_told_apart(
    ingest_sources: Callable[..., Outcome], tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        write(tmp_path / "set" / folder / "p.jsonl", range(1), split="none")
    write(tmp_path / "set" / "train.jsonl", range(5, 7))
    write(tmp_path / "set" / "test.jsonl", range(8, 9))
    found = ingest_sources({"set": {"path": str(tmp_path / "set")}})
    assert [line["file"] for line in found.quarantine] == ["set: a/p.jsonl", "set: b/p.jsonl"]


# --- the hub --------------------------------------------------------------------------------------

TRAIN_AND_TEST = [("default/test/0000.parquet", "test"), ("default/train/0000.parquet", "train")]


@pytest.mark.parametrize(
    ("files", "subset", "expected"),
    [
        (["README.md", "orca_rlhf.jsonl"], None, [("orca_rlhf.jsonl", None)]),
        (["rlaif_data.parquet", "config.json"], None, [("rlaif_data.parquet", None)]),
        (["dataset_infos.json", "pairs.json"], None, [("pairs.json", None)]),
        (["train.csv", "test.csv.zst"], None, [("test.csv.zst", "test"), ("train.csv", "train")]),
        (["train.jsonl", "p/p.jsonl.gz"], "p", [("p/p.jsonl.gz", None)]),
        (["train.jsonl", "p/p.jsonl.gz"], None, [("train.jsonl", None)]),
        ([name for name, _ in TRAIN_AND_TEST], None, TRAIN_AND_TEST),
        (
            ["data/train-00000-of-00001.parquet"],
            "data",
            [("data/train-00000-of-00001.parquet", None)],
        ),
    ],
)
def test_files_of_a_data_set_of_the_hub(
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    subset: str | None,
    expected: list[tuple[str, str | None]],
) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in files]
    info = SimpleNamespace(sha="x", siblings=siblings)
    monkeypatch.setattr(sources, "_hub_info", lambda *_: info)
    fetched: list[str] = []

    def download(_: str, *, allow_patterns: list[str], **__: object) -> str:
        fetched.extend(allow_patterns)
        return "/"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with opened("x", SourceConfig(hub="some/set", hub_subset=subset)) as found:
        assert [(file.shown.removeprefix("x: "), file.split) for file in found] == expected
    assert fetched == [name for name, _ in expected]
