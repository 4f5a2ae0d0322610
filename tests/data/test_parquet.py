"""The contract: what ingest wrote can be read, by us in every version and by others."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.data.parquet import read_pairs
from dpo.data.schema import SCHEMA_VERSION
from dpo.errors import ArtifactError
from dpo.storage.manifest import write_manifest
from tests.data.conftest import Outcome, good_row

VERSIONS = Path(__file__).parent / "versions"


def as_output(table: pa.Table, folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(table, folder / "pairs-00000.parquet")
    write_manifest(folder, "ingest")
    return folder


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_files_of_each_version_are_read(version: int, tmp_path: Path) -> None:
    """The files hold the same five pairs, written by the code of that version."""
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(VERSIONS / f"{version}.parquet", folder / "pairs-00000.parquet")
    write_manifest(folder, "ingest")
    train, test = read_pairs(folder, "train"), read_pairs(folder, "test")
    assert [row.pair_id[:8] for row in train.rows] == ["abc60dfd", "b647ca9b", "2acae560"]
    assert [row.pair_id[:8] for row in test.rows] == ["9e5500ca", "8cacd90e"]
    assert (train.prompt_format, train.weights) == ("raw", {})
    first = test.rows[1]
    assert first.rejected == " How did you come up with this?"
    assert first.sft_target == first.chosen
    assert first.dataset == "hh_sample"


def test_what_ingest_wrote_is_read_with_its_weights(ingest: Callable[..., Outcome]) -> None:
    found = ingest([good_row(1, "train"), good_row(2, "test")], {"weight": 2.5})
    train = read_pairs(found.folder, "train")
    assert [row.prompt for row in train.rows] == ["Question 1?", "Question -1?"]
    assert train.weights == {"rows": 2.5, "good": 1.0}
    assert (
        train.content_hash
        == json.loads((found.folder / "manifest.json").read_text())["content_hash"]
    )


@pytest.mark.parametrize("change", ["cut", "byte", "gone"])
def test_a_changed_output_is_refused(ingest: Callable[..., Outcome], change: str) -> None:
    path = ingest([good_row(1)]).folder / "pairs-00000.parquet"
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if change == "cut" else b"X" + data[1:])
    with pytest.raises(ArtifactError, match=r"pairs-00000\.parquet"):
        read_pairs(path.parent, "train")


def test_another_schema_is_refused(tmp_path: Path) -> None:
    table = pq.read_table(VERSIONS / "1.parquet")
    newer = table.replace_schema_metadata({"dpo.schema_version": "99", "dpo.prompt_format": "raw"})
    number = table.set_column(0, "prompt", pa.array(range(table.num_rows)))
    cases: list[tuple[pa.Table, str]] = [
        (newer, "schema version 99"),
        (table.replace_schema_metadata(None), "schema version none"),
        (table.drop_columns(["chosen"]), "columns are missing or hold no text: chosen"),
        (number, "columns are missing or hold no text: prompt"),
    ]
    for index, (changed, message) in enumerate(cases):
        with pytest.raises(ArtifactError, match=message):
            read_pairs(as_output(changed, tmp_path / str(index)), "train")


def test_others_read_it(ingest: Callable[..., Outcome]) -> None:
    turns = [{"role": "user", "content": "Hi?"}]
    row: dict[str, Any] = {"prompt": turns, "chosen": "a", "rejected": "b"}
    found = ingest([row])
    path = found.folder / "pairs-00000.parquet"
    import pandas as pd

    frame = pd.read_parquet(path)
    assert list(frame.columns) == [
        *("prompt", "chosen", "rejected", "sft_target", "dataset", "split", "pair_id"),
        "prompt_messages",
    ]
    assert frame.prompt_messages[0].tolist() == turns
    assert frame.prompt_messages[1] is None
    duckdb = pytest.importorskip("duckdb", reason="pip install duckdb")
    count = duckdb.sql(f"select count(*) from '{path}' where dataset = 'rows'").fetchall()
    assert count == [(1,)]
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(found.folder.parent / "cache"))
    assert loaded[0]["prompt_messages"] == turns
    assert loaded.num_rows == 3


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (pa.timestamp("ns"), 1_700_000_000_123_456_789),
        (pa.timestamp("ms"), 10**15),
        (pa.timestamp("us", "Mars/Phobos"), 1),
        (pa.date32(), 10**7),
    ],
)
def test_a_time_that_python_has_none_for_costs_no_row(tmp_path, kind, number):
    """Seen: nanoseconds, which pandas writes, ended ingest in a traceback where pandas is not."""
    column = pa.array([number, None, number], kind)
    texts = ["one", "two", "three"]
    pq.write_table(pa.table({"prompt": texts, "created": column}), tmp_path / "x.parquet")
    code = (
        "import sys; from pathlib import Path; from dpo.data import check\n"
        "from dpo.data.readers import rows\n"
        "check._spare_pandas()\n"
        "for row in rows(Path(sys.argv[1]), 'x'): print(row.value, row.problem)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values = [number, None, number]
    rows = [{"prompt": text, "created": n} for text, n in zip(texts, values, strict=True)]
    assert done.stdout.splitlines() == [f"{row} " for row in rows]
