"""How many processes check rows, and in which blocks: the result does not depend on it."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data import division
from dpo.data.stage import run_ingest
from tests.data.conftest import Ingest, good_row


def many_rows(tmp_path: Path) -> Path:
    """Rows of every kind, with blank lines, in a file of several blocks."""
    lines = []
    for number in range(3000):
        kind = number % 10
        one = good_row(number)
        if kind == 1:
            one = good_row(number - 1)
        elif kind == 2:
            one["chosen"] = ""
        elif kind == 3:
            other = good_row(number - 3)
            one = other | {"chosen": other["rejected"], "rejected": other["chosen"]}
        elif kind == 4:
            one = {"prompt": f"rated {number % 7}", "completion": f"{number}", "score": number}
        lines.append(json.dumps(one) + ("\n\n" if kind == 5 else "\n"))
    path = tmp_path / "many.jsonl"
    path.write_text("".join(lines))
    return path


def test_workers_and_blocks_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division, "BLOCK_BYTES", 20_000)
    path = many_rows(tmp_path)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    config = RunConfig(
        model=ModelConfig(name_or_path="builtin:tiny"),
        sources={
            "a": SourceConfig(path=str(path), max_pairs_per_prompt=20),
            "b": SourceConfig(path=str(tmp_path / "packed.jsonl.gz"), max_pairs=50),
        },
        max_rejected_share=1,
    )
    hashes = [
        run_ingest(config, tmp_path / f"out{workers}", workers=workers).content_hash
        for workers in (1, 2)
    ]
    assert hashes[0] == hashes[1]


SCRIPT = """
from pathlib import Path
from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data.stage import run_ingest

print("the script begins")
config = RunConfig(
    datasets=["many"],
    sources={"many": SourceConfig(path="many")},
    model=ModelConfig(name_or_path="builtin:tiny"),
)
print(run_ingest(config, Path("out"), workers=2).details["metrics"]["pairs"], "pairs")
"""


def test_a_script_without_a_main_guard_is_not_run_again_by_workers(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for name in range(3):
        rows = [good_row(10 * name + number) for number in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "many" / f"{name}.jsonl").write_text(text)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("the script begins\n24 pairs\n", 0), done.stderr


def test_line_numbers_do_not_depend_on_blocks(
    ingest_sources: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many_rows(tmp_path)
    whole = ingest_sources({"many": {"path": str(path)}})
    monkeypatch.setattr(division, "BLOCK_BYTES", 5000)
    blocks = ingest_sources({"many": {"path": str(path)}})
    assert blocks.quarantine == whole.quarantine
    assert blocks.pairs == whole.pairs
    assert blocks.report == whole.report
    lines = path.read_text().split("\n")
    for item in whole.quarantine:
        if item["reason"] == "empty":
            assert json.loads(lines[item["line"] - 1]) == item["row"]


def children(pid: int) -> list[int]:
    """Processes that check rows for process ``pid``."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {child: Path(f"/proc/{child}/cmdline") for child in found}
    return [int(c) for c, path in commands.items() if b"spawn_main" in path.read_bytes()]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_an_ingest_that_is_stopped_as_it_starts(
    tmp_path: Path, how: signal.Signals
) -> None:
    """While the workers import; their pipes are open at both ends in each of them."""
    (tmp_path / "many").mkdir()
    for name in range(3):
        (tmp_path / "many" / f"{name}.jsonl").write_text(json.dumps(good_row(name)))
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment)
    while not (workers := children(process.pid)):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(how)
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    """Not even a process that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
