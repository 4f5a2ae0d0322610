"""The token cache beside ``datasets.map``: the same pairs and the same tokenizer.

    python -m tests.benchmarks.tokenisation --pairs 20000

Prints one JSON object a line. ``ours`` fills the cache from an ingest output (``dpo tokenize``);
``map`` reads the same Parquet file with ``datasets`` and maps over it in batches of 1,000, once in
one process, whose tokenizer uses all cores, and once in one process a core; its result is written
as Arrow, as it always is. Each runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from tests.benchmarks.ingest import make_rows

_ROW_BYTES = 1450
_TEXTS = ("prompt", "chosen", "rejected")


def with_ours(data: Path, scratch: Path, tokenizer: Any) -> int:
    """Fill an empty cache; returns the number of tokens."""
    from dpo.data.tokens import fill_cache
    from dpo.storage.manifest import read_manifest

    os.environ["DPO_TOKENS_DIR"] = str(scratch)
    folder = fill_cache(data, tokenizer)
    assert folder is not None
    return int(read_manifest(folder).details["tokens"])


def with_map(data: Path, scratch: Path, tokenizer: Any, processes: int | None) -> int:
    """Map over the same pairs; returns the number of tokens."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, data.glob("pairs-*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(scratch))

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            f"{name}_ids": tokenizer(batch[name], add_special_tokens=False)["input_ids"]
            for name in _TEXTS
        }

    names = rows.column_names
    start = time.perf_counter()
    found = rows.map(
        tokenize, batched=True, batch_size=1000, num_proc=processes, remove_columns=names
    )
    print(json.dumps({"map_wall_s": round(time.perf_counter() - start, 2)}), file=sys.stderr)
    return sum(
        len(ids) for name in _TEXTS for batch in found.iter(10_000) for ids in batch[f"{name}_ids"]
    )


def _measure(what: str, data: Path, scratch: Path, tokenizer_folder: Path) -> None:
    from dpo.data.tokenize import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    start = time.perf_counter()
    if what == "ours":
        n_tokens = with_ours(data, scratch, tokenizer)
    else:
        processes = len(os.sched_getaffinity(0)) if what == "map-processes" else None
        n_tokens = with_map(data, scratch, tokenizer, processes)
    seconds = time.perf_counter() - start
    figures = {
        "benchmark": f"tokenisation/{what}",
        "tokens": n_tokens,
        "wall_s": round(seconds, 2),
        "tokens_per_s": round(n_tokens / seconds),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(figures))


def main() -> None:
    """Run all and print their figures and the ratios of their times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--model", default="builtin:tiny", help="whose tokenizer")
    parser.add_argument("--only", nargs=4, metavar=("WHAT", "DATA", "SCRATCH", "TOKENIZER"))
    options = parser.parse_args()
    if options.only:
        what, *paths = options.only
        _measure(what, *map(Path, paths))
        return
    from dpo.data.stage import run_ingest
    from dpo.storage.base_model import local_tokenizer

    model = ModelConfig(name_or_path=options.model)
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder / "rows.jsonl", options.pairs * _ROW_BYTES)
        source = SourceConfig(format="hh", path=str(folder / "rows.jsonl"))
        run_ingest(RunConfig(model=model, sources={"rows": source}), folder / "data")
        found = {}
        for what in ("ours", "map", "map-processes"):
            found[what] = _in_own_process(what, folder, local_tokenizer(model))
            print(json.dumps(found[what]), flush=True)
    ratios = {
        what: round(found[what]["wall_s"] / found["ours"]["wall_s"], 2)
        for what in ("map", "map-processes")
    }
    print(json.dumps({"benchmark": "tokenisation/ratio", **ratios}))


def _in_own_process(what: str, folder: Path, tokenizer: Path) -> dict[str, Any]:
    scratch = folder / what
    places = map(str, (folder / "data", scratch, tokenizer))
    command = [sys.executable, "-m", "tests.benchmarks.tokenisation", "--only", what, *places]
    environment = {**os.environ, "HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
