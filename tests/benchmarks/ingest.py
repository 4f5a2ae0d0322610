"""Ingest beside pyarrow: the same JSON Lines file, with every check and with none.

    python -m tests.benchmarks.ingest --gigabytes 2

Prints one JSON object a line. ``pyarrow`` reads the file in blocks with its own JSON reader and
writes zstd Parquet; ``ingest`` does all that ingest does. Both use the same cores. The file is made
of the packaged pairs, each with a number in its prompt, so that rows differ. ``peak_all_mib`` is
the memory of all processes together, looked at twice a second.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import orjson
import pyarrow as pa
import pyarrow.json as pj
import pyarrow.parquet as pq

from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data.stage import run_ingest

_LOOK_SECONDS = 0.5


def make_rows(path: Path, n_bytes: int) -> int:
    """Write a file of about ``n_bytes``; returns the number of its rows."""
    packaged = builtin("builtin:hh-harmless")
    assert packaged is not None
    rows = [orjson.loads(line) for line in gzip.decompress(packaged.read_bytes()).splitlines()]
    n_rows = 0
    with path.open("wb") as file:
        while file.tell() < n_bytes:
            mark = f"\n\nHuman: Case {n_rows // len(rows)}."
            row = rows[n_rows % len(rows)]
            values = {name: mark + row[name].removeprefix("\n\nHuman:") for name in row}
            file.write(orjson.dumps(values) + b"\n")
            n_rows += 1
    return n_rows


def with_pyarrow(source: Path, target: Path) -> None:
    """Read and write, with no check."""
    with (
        pj.open_json(source) as reader,
        pq.ParquetWriter(target, reader.schema, compression="zstd") as writer,
    ):
        for batch in reader:
            writer.write_table(pa.Table.from_batches([batch]))


def with_ingest(source: Path, target: Path) -> None:
    """The whole stage."""
    config = RunConfig(
        model=ModelConfig(name_or_path="builtin:tiny"),
        sources={"rows": SourceConfig(format="hh", path=str(source))},
    )
    run_ingest(config, target)


def _in_own_process(what: str, source: Path, target: Path) -> dict[str, object]:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.ingest",
        "--only",
        what,
        str(source),
        str(target),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_kib = 0
    while process.poll() is None:
        peak_kib = max(peak_kib, sum(map(_memory_kib, _family(process.pid))))
        time.sleep(_LOOK_SECONDS)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    found: dict[str, object] = json.loads(output.splitlines()[-1])
    return {**found, "peak_all_mib": peak_kib // 1024}


def _family(pid: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(one for child in children for one in _family(int(child)))]


def _memory_kib(pid: int) -> int:
    """Resident memory, what is shared divided among those who share it (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _measure(what: str, source: Path, target: Path) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    (with_pyarrow if what == "pyarrow" else with_ingest)(source, target)
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "benchmark": f"ingest/{what}",
        "gigabytes": round(source.stat().st_size / 1e9, 2),
        "wall_s": round(time.perf_counter() - start, 2),
        "cpu_s": round(time.process_time() - cpu + workers.ru_utime + workers.ru_stime, 2),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(figures))


def main() -> None:
    """Run both and print their figures and the ratio of their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--only", nargs=3, metavar=("WHAT", "SOURCE", "TARGET"))
    options = parser.parse_args()
    if options.only:
        what, source, target = options.only
        _measure(what, Path(source), Path(target))
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        n_rows = make_rows(folder / "rows.jsonl", int(options.gigabytes * 1e9))
        plain = _in_own_process("pyarrow", folder / "rows.jsonl", folder / "plain.parquet")
        checked = _in_own_process("ingest", folder / "rows.jsonl", folder / "out")
    print(json.dumps(plain))
    print(json.dumps({**checked, "rows": n_rows}))
    ratio = float(str(checked["wall_s"])) / float(str(plain["wall_s"]))
    cpu = float(str(checked["cpu_s"])) / float(str(plain["cpu_s"]))
    print(json.dumps({"benchmark": "ingest/ratio", "wall": round(ratio, 2), "cpu": round(cpu, 2)}))


if __name__ == "__main__":
    main()
