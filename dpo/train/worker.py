"""One process of a training over several: started by ``dpo.train.launch``."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dpo.config.stages import load_stage
from dpo.errors import DpoError
from dpo.train.launch import only_first_reports_progress, report_error
from dpo.train.stage import run_train

_TIMEOUT = timedelta(minutes=10)
"""A process that hangs, or a host that does not come, ends the job after this time."""


def main(job_file: Path) -> int:
    """Train as ``job_file`` says; returns the exit code."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    only_first_reports_progress(rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT
    )
    paths = {name: Path(value) if value else None for name, value in job["paths"].items()}
    output, pairs = paths.pop("output"), paths.pop("pairs")
    assert output is not None
    assert pairs is not None
    config = load_stage(job["stage"], job["settings"])
    try:
        run_train(config, output, pairs=pairs, **paths, code=job["code"])
    except DpoError as error:
        report_error(job_file, rank, error)
        print(f"rank {rank}: {error}", file=sys.stderr)
        return error.exit_code
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
