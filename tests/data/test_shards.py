"""Several tasks write what one writes, byte for byte; shards of different sets are refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dpo.cli import main
from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data import division
from dpo.data.division import Shard
from dpo.data.shards import parse_shard, run_shard
from dpo.data.stage import run_ingest
from dpo.errors import ArtifactError, ConfigError
from dpo.storage.manifest import sha256_file
from dpo.storage.store import open_store
from tests.data.conftest import good_row


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Blocks of one file, several files, faults, repeats over blocks, and rated answers."""
    monkeypatch.setattr(division, "BLOCK_BYTES", 1500)
    big = [good_row(number) for number in range(90)]
    big[17]["chosen"] = ""
    big[33] = {**good_row(33), "chosen": "\ud83d"}
    big[70] = good_row(3)
    big[71] = {**good_row(5), "chosen": "no 5", "rejected": "yes 5"}
    (tmp_path / "big.jsonl").write_text("".join(json.dumps(row) + "\n" for row in big))
    many = tmp_path / "many"
    many.mkdir()
    for name in ("train", "test", "validation"):
        rows = [good_row(hash_of(name) + number) for number in range(5)]
        (many / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rated = [
        {"prompt": f"p{number // 2}", "completion": f"a{number}", "score": number}
        for number in range(60)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    return {
        "big": {"path": str(tmp_path / "big.jsonl"), "max_pairs": 50},
        "many": {"path": str(many)},
        "rated": {"path": str(tmp_path / "rated.jsonl")},
    }


def hash_of(name: str) -> int:
    return 1000 * len(name)


def config_of(sources: dict[str, Any], **settings: Any) -> RunConfig:
    return RunConfig(
        datasets=list(sources),
        sources={name: SourceConfig(**values) for name, values in sources.items()},
        **{"model": ModelConfig(name_or_path="builtin:tiny"), "max_rejected_share": 1.0},
        **settings,
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_shards_write_what_one_task_writes(
    tmp_path: Path, sources: dict[str, Any], n_shards: int
) -> None:
    config = config_of(sources)
    run_ingest(config, tmp_path / "one", workers=1)
    folders = [tmp_path / f"shard-{number}" for number in range(1, n_shards + 1)]
    for number, folder in enumerate(folders, 1):
        run_shard(config, folder, Shard(number, n_shards), workers=1)
    run_ingest(config, tmp_path / "many-tasks", shards=folders[::-1])
    assert hashes(tmp_path / "many-tasks") == hashes(tmp_path / "one")
    figures = json.loads((tmp_path / "one" / "report.json").read_text())["figures"]
    assert {"empty", "unreadable", "duplicate_pair", "contradictory_pair"} <= set(
        figures["reasons"]
    )
    assert figures["by_source"]["rated"]["pairs"] > 0
    if n_shards == 2:
        # the work is shared, not done by one
        rows = [json.loads((f / "manifest.json").read_text())["details"]["rows"] for f in folders]
        assert min(rows) > 0.3 * sum(rows)


def test_shards_of_other_data_or_settings_are_refused(
    tmp_path: Path, sources: dict[str, Any]
) -> None:
    config = config_of(sources)
    for number in (1, 2):
        run_shard(config, tmp_path / f"{number}", Shard(number, 2), workers=1)
    one, two = tmp_path / "1", tmp_path / "2"
    for folders in ([one], [one, one], [one, two, two]):
        with pytest.raises(ArtifactError, match="not all shards of one set"):
            run_ingest(config, tmp_path / "out", shards=folders)
    with pytest.raises(ArtifactError, match="made with other settings"):
        run_ingest(config_of(sources, test_fraction=0.5), tmp_path / "out", shards=[one, two])
    with (tmp_path / "rated.jsonl").open("a") as file:
        file.write("\n")
    run_shard(config, tmp_path / "other", Shard(2, 2), workers=1)
    with pytest.raises(ArtifactError, match="made with other data"):
        run_ingest(config, tmp_path / "out", shards=[one, tmp_path / "other"])
    (two / "shard.json").write_text("[]")
    with pytest.raises(ArtifactError):
        run_ingest(config, tmp_path / "out", shards=[one, two])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/2/3"])
def test_a_shard_is_a_number_of_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="names no shard"):
        parse_shard(text)


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(good_row(n)) + "\n" for n in range(40)))
    common = ["ingest", "datasets=[rows.jsonl]", "model=tiny"]
    for number in (1, 2):
        assert main([*common, f"shard={number}/2", f"output=parts/{number}"]) == 0
    assert main([*common, "shards=parts/*", "output=merged"]) == 0
    assert main([*common, "output=one"]) == 0
    assert hashes(tmp_path / "merged") == hashes(tmp_path / "one")
    assert main([*common, "shards=none/*", "output=x"]) == 2
    assert main([*common, "shard=1/2", "shards=parts/*", "output=x"]) == 2
    assert not Path("x").exists()


@pytest.mark.minio
def test_of_a_store_a_shard_fetches_its_own_files_alone(
    bucket_url: str, tmp_path: Path, sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"{bucket_url}/sets")
    store.check(create=True)
    for path in (tmp_path / "many").iterdir():
        # packed, a file cannot be divided
        packed = tmp_path / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        store.upload(packed, f"many/{packed.name}", sha256_file(packed))
    config = config_of({"many": {"path": f"{bucket_url}/sets/many"}})
    run_ingest(config, tmp_path / "one", workers=1)
    fetched: list[str] = []
    download = type(store).download

    def note(self: Any, key: str, target: Path) -> Any:
        fetched.append(key)
        return download(self, key, target)

    monkeypatch.setattr(type(store), "download", note)
    folders = [tmp_path / f"shard-{number}" for number in (1, 2)]
    for number, folder in enumerate(folders, 1):
        run_shard(config, folder, Shard(number, 2), workers=1)
    run_ingest(config, tmp_path / "merged", shards=folders)
    assert sorted(fetched) == [f"many/{name}.jsonl.gz" for name in ("test", "train", "validation")]
    assert hashes(tmp_path / "merged") == hashes(tmp_path / "one")


@pytest.mark.minio
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_of_a_large_object_a_shard_fetches_its_own_blocks_alone(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes
) -> None:
    """Seven MiB in blocks of one; beside its blocks a shard reads the head and each block's end."""
    monkeypatch.setattr(division, "BLOCK_BYTES", 2**20)
    rows = [{**good_row(number), "note": "x" * 20_000} for number in range(360)]
    rows[200]["chosen"] = ""
    path = tmp_path / "large.jsonl"
    path.write_bytes(mark + "".join(json.dumps(row) + "\n" for row in rows).encode())
    small = tmp_path / "small.jsonl"
    small.write_text("".join(json.dumps(good_row(1000 + n)) + "\n" for n in range(9)))
    store = open_store(f"{bucket_url}/sets")
    store.check(create=True)
    for file in (path, small):
        store.upload(file, f"all/{file.name}", sha256_file(file))
    config = config_of({"large": {"path": f"{bucket_url}/sets/all"}})
    run_ingest(config, tmp_path / "one", workers=1)
    n_bytes = 0
    read_range = type(store).read_range

    def count(self: Any, key: str, start: int, size: int) -> bytes:
        nonlocal n_bytes
        data = read_range(self, key, start, size)
        n_bytes += len(data)
        return data

    monkeypatch.setattr(type(store), "read_range", count)
    folders = [tmp_path / f"shard-{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        n_bytes = 0
        run_shard(config, folder, Shard(number, 3), workers=1)
        # of eight blocks three at most
        assert 2 * 2**20 < n_bytes <= (2 + 3 + 1) * 2**20
    run_ingest(config, tmp_path / "merged", shards=folders)
    assert hashes(tmp_path / "merged") == hashes(tmp_path / "one")
    quarantine = (tmp_path / "one" / "quarantine.jsonl").read_text()
    assert '"line":201' in quarantine.replace(" ", "")
