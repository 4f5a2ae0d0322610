"""Where sources are found: files, folders, globs, stores, communities, the hub."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from minio import MinioAdmin
from minio.credentials import StaticProvider

from dpo.cli import main
from dpo.config.compose import compose
from dpo.config.sources import SourceConfig
from dpo.data.sources import data_fingerprint, opened, source_fingerprint
from dpo.errors import ConfigError, DataError, StoreError
from dpo.storage.manifest import sha256_file
from dpo.storage.store import open_store
from tests.data.conftest import GOOD, Outcome, good_row
from tests.support.minio import MinioServer

LINES = "".join(json.dumps(row) + "\n" for row in GOOD)


def names(source: SourceConfig) -> list[tuple[str, str | None]]:
    with opened("mine", source) as files:
        return [(file.shown, file.split) for file in files]


def fingerprint(path: object) -> str:
    return source_fingerprint("mine", SourceConfig(path=str(path)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    for name in ("train.jsonl", "deep/test-0.jsonl", "README.md", ".hidden.jsonl", "manifest.json"):
        (root / name).write_text(LINES)
    return root


def test_a_folder_gives_its_data_files_with_their_splits(folder: Path) -> None:
    expected = [("mine: deep/test-0.jsonl", "test"), ("mine: train.jsonl", "train")]
    assert names(SourceConfig(path=str(folder))) == expected
    assert names(SourceConfig(path=f"file://{folder}")) == expected
    assert names(SourceConfig(path=f"{folder}/**/*.jsonl"))[-1] == expected[-1]


def test_files_of_a_folder_that_cannot_be_read_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names(SourceConfig(path=str(folder)))
    assert "not read" not in capsys.readouterr().err
    for name in ("b.xlsx", "a.jsonl.bz2", "deep/notes.TXT"):
        (folder / name).write_bytes(b"PK")
    names(SourceConfig(path=str(folder)))
    told = f"another kind are not read: a.jsonl.bz2, b.xlsx, deep/notes.TXT in {folder}"
    assert told in capsys.readouterr().err
    names(SourceConfig(path=str(folder / "train.jsonl")))
    assert "not read" not in capsys.readouterr().err


def test_what_lies_in_hidden_folders_is_not_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = names(SourceConfig(path=str(folder)))
    for name in (".ipynb_checkpoints/train-checkpoint.jsonl", "deep/_temporary/0/part-0.jsonl"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(LINES)
    capsys.readouterr()
    assert names(SourceConfig(path=str(folder))) == expected
    told = f"begin with _ or . are not read: deep/_temporary/0/part-0.jsonl in {folder}"
    assert told in capsys.readouterr().err
    # who names such a folder means it
    found = names(SourceConfig(path=str(folder / ".ipynb_checkpoints")))
    assert [name for name, _ in found] == ["mine: train-checkpoint.jsonl"]


def test_hidden_data_is_told_wherever_it_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "e"
    left_out = ("_parts/0/x.jsonl", ".old/x.jsonl")
    noise = ("_delta_log/0.json", "_metadata.json", ".git/x.json", ".cache/x.jsonl", ".a.jsonl")
    for name in (*left_out, *noise):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(LINES)
    for path in (root, f"{root}/**/*.jsonl"):
        with pytest.raises(DataError) as caught:
            names(SourceConfig(path=str(path)))
        assert "1 below _parts" in str(caught.value)
        assert "name that folder" in str(caught.value)
    (root / "a.jsonl").write_text(LINES)
    for path in (root, f"{root}/**/*.jsonl"):
        assert names(SourceConfig(path=str(path))) == [("mine: a.jsonl", None)]
        told = capsys.readouterr().err
        assert "_parts/0/x.jsonl in" in told
        assert not any(name in told for name in noise)
    names(SourceConfig(path=str(root)))
    assert "are not read: .old/x.jsonl, _parts/0/x.jsonl in" in capsys.readouterr().err
    # a glob may write the folder out
    for glob in ("_parts/*/*.jsonl", "*/0/../../_parts/0/*.jsonl", "_p*/0/x.jsonl"):
        assert len(names(SourceConfig(path=f"{root}/{glob}"))) == 1


def test_of_an_output_of_ingest_the_pairs_alone_are_read(
    ingest_sources: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*GOOD, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = ingest_sources({"mine": {"path": str(path)}})
    kept = first.folder.rename(tmp_path / "kept")
    again = ingest_sources({"mine": {"path": str(kept)}})
    assert again.pairs == first.pairs
    assert again.quarantine == []
    told = "the pairs are read, and not what lies beside them: quarantine.jsonl, report.json in"
    assert told in capsys.readouterr().err
    assert names(SourceConfig(path=str(kept))) == [("mine: pairs-00000.parquet", None)]
    # without ingest's manifest they are files like others
    (kept / "manifest.json").unlink()
    assert len(names(SourceConfig(path=str(kept)))) == 3


def test_a_file_alone_states_no_split(folder: Path) -> None:
    assert names(SourceConfig(path=str(folder / "train.jsonl"))) == [("mine: train.jsonl", None)]


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, message in (
        ("none.jsonl", "no such file or folder"),
        ("*.none", "no data files here"),
        ("empty", "no data files here"),
        ("loop.jsonl", "leads nowhere, or in a circle"),
        ("pipe.jsonl", "no regular file"),
        ("a\0b", "cannot be followed|no such file or folder"),
        ("x" * 5000, "cannot be followed|no such file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            names(SourceConfig(path=f"{tmp_path}/{path}"))
    with pytest.raises(DataError, match="no packaged data set builtin:other"):
        names(SourceConfig(path="builtin:other"))
    with pytest.raises(DataError, match="not the URL of a data set on the hub"):
        names(SourceConfig(path="hf://only"))


def test_a_fingerprint_follows_the_bytes_alone(folder: Path) -> None:
    before = fingerprint(folder)
    assert before.startswith("sha256:")
    os.utime(folder / "train.jsonl", (0, 0))
    (folder / "README.md").write_text("other")
    assert fingerprint(folder) == before
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n")
    assert fingerprint(folder) != before
    assert data_fingerprint({"a": "1", "b": "2"}) == data_fingerprint({"b": "2", "a": "1"})
    assert data_fingerprint({"a": "1", "b": "2"}) != data_fingerprint({"a": "2", "b": "1"})


def test_community_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DPO_COMMUNITY_DATA", raising=False)
    source = SourceConfig(format="novalto", community="garden")
    with pytest.raises(DataError, match=r"nowhere: looked for toy-data/garden\.json"):
        names(source)
    (tmp_path / "toy-data").mkdir()
    (tmp_path / "toy-data" / "garden.json").write_text(json.dumps({"dataset": GOOD}))
    assert names(source) == [("mine: garden.json", None)]
    assert names(SourceConfig(format="novalto")) == [("mine: garden.json", None)]
    stored = tmp_path / "stored" / "garden"
    stored.mkdir(parents=True)
    (stored / "1.json").write_text(json.dumps(GOOD))
    monkeypatch.setenv("DPO_COMMUNITY_DATA", str(tmp_path / "stored"))
    assert names(source) == [("mine: 1.json", None)]
    monkeypatch.setenv("DPO_COMMUNITY_DATA", f"file://{tmp_path}/stored")
    assert names(source) == [("mine: 1.json", None)]


def test_the_community_form(ingest_sources: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "garden.json"
    path.write_text(json.dumps({"communityId": "garden", "dataset": [*GOOD, good_row(1)]}))
    found = ingest_sources({"novalto": {"format": "novalto", "path": str(path)}})
    assert [pair["prompt"] for pair in found.pairs] == [
        "Question -1?",
        "Question -2?",
        "Question 1?",
    ]
    path.write_text(json.dumps([*GOOD, good_row(1)]))
    assert len(ingest_sources({"novalto": {"format": "novalto", "path": str(path)}}).pairs) == 3


@pytest.mark.minio
def test_a_store(
    bucket_url: str,
    folder: Path,
    ingest_sources: Callable[..., Outcome],
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = open_store(f"{bucket_url}/sets")
    store.check(create=True)
    for name in ("train.jsonl", "deep/test-0.jsonl"):
        path = folder / name
        store.upload(path, f"mine/{name}", sha256_file(path))
    store.write("mine/notes.txt", b"no data")
    store.write("mine/_temporary/0/part-0.jsonl", LINES.encode())
    url = f"{bucket_url}/sets/mine"
    assert names(SourceConfig(path=url)) == [
        ("mine: deep/test-0.jsonl", "test"),
        ("mine: train.jsonl", "train"),
    ]
    assert f"another kind are not read: notes.txt in {url}" in capsys.readouterr().err
    assert names(SourceConfig(path=f"{url}/train.jsonl")) == [("mine: train.jsonl", None)]
    assert "not read" not in capsys.readouterr().err
    before = fingerprint(url)
    assert before.startswith("etag:")
    found = ingest_sources({"mine": {"path": url}})
    assert found.report["sources"] == {"mine": before}
    assert len(found.pairs) == 2
    assert names(SourceConfig(path=bucket_url)) == [
        ("mine: sets/mine/deep/test-0.jsonl", "test"),
        ("mine: sets/mine/train.jsonl", "train"),
    ]
    store.write("mine/more.jsonl", b"{}\n")
    assert fingerprint(url) != before
    with pytest.raises(DataError, match="no data objects here"):
        names(SourceConfig(path=f"{bucket_url}/sets/none"))


@pytest.mark.minio
def test_a_store_without_permission(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError):
        names(SourceConfig(path=f"{bucket_url}/x/y.jsonl"))


@pytest.mark.minio
def test_an_account_that_may_not_read(
    bucket_url: str,
    minio_environment: MinioServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A real account without any policy: its signature is right, and it may do nothing."""
    store = open_store(f"{bucket_url}/sets")
    store.check(create=True)
    store.write("mine/a.jsonl", LINES.encode())
    admin = MinioAdmin(
        endpoint=minio_environment.endpoint.removeprefix("http://"),
        credentials=StaticProvider(minio_environment.access_key, minio_environment.secret_key),
        secure=False,
    )
    admin.user_add("nobody-at-all", "nobody-at-all-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody-at-all")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody-at-all-secret")
    for url in (f"{bucket_url}/sets/mine", f"{bucket_url}/sets/mine/a.jsonl"):
        with pytest.raises(StoreError, match="may not"):
            names(SourceConfig(path=url))
        assert main(["ingest", "--check", url]) != 0
        printed = capsys.readouterr()
        assert "may not" in printed.err
        assert "Traceback" not in printed.err + printed.out


@pytest.mark.minio
def test_an_object_that_changes_while_it_is_fetched(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{bucket_url}/sets")
    store.check(create=True)
    store.write("mine/a.jsonl", LINES.encode())
    download = type(store).download

    def then_write(self: Any, key: str, target: Path) -> None:
        download(self, key, target)
        store.write("mine/a.jsonl", LINES.encode() * 2)

    monkeypatch.setattr(type(store), "download", then_write)
    with pytest.raises(DataError, match="changed while they were fetched"):
        names(SourceConfig(path=f"{bucket_url}/sets/mine"))


def test_an_unknown_format_names_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"format=foo: choose one of auto, .* or module:function"):
        compose(["datasets=[hh]", "sources.hh.format=foo"])
    assert compose(["datasets=[hh]", "sources.hh.format=a.b:c"]).config.sources["hh"].format


def test_links_to_folders_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen: a half of the rows lay behind a link, and ``--check`` found nothing wrong."""
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "b.jsonl").write_text(LINES)
    expected = names(SourceConfig(path=str(folder)))
    assert "links" not in capsys.readouterr().err
    (folder / "deep" / "more").symlink_to(folder.parent / "other")
    assert names(SourceConfig(path=str(folder))) == expected
    assert f"links to folders are not followed: deep/more in {folder}" in capsys.readouterr().err
    # what is named itself may be a link
    assert names(SourceConfig(path=str(folder / "deep" / "more"))) == [("mine: b.jsonl", None)]
    (folder / "alone").mkdir()
    (folder / "alone" / "more").symlink_to(folder.parent / "other")
    with pytest.raises(DataError, match=r"links to folders are not followed \(more\): name that"):
        names(SourceConfig(path=str(folder / "alone")))
