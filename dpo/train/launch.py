"""Starts the processes of one training: torchrun's agent, called from a function.

Hosts are described by the variables that Kubeflow's PyTorchJob and torchrun use: ``PET_NNODES``,
``PET_RDZV_ENDPOINT`` and ``PET_RDZV_ID``. Without them all processes are on this host.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dpo.errors
from dpo.errors import DpoError, TrainingError
from dpo.storage.progress import FILE_VARIABLE

PROCESSES_VARIABLE = "DPO_PROCESSES"
"""Number of processes on this host; one a GPU, or one, when it is not set."""
_OPEN_FILES = 1 << 16


def processes_here() -> int:
    """How many processes this host takes.

    Raises:
        TrainingError: the variable holds no positive number.
    """
    import torch

    text = os.environ.get(PROCESSES_VARIABLE, "")
    if not text:
        return max(1, torch.cuda.device_count())
    if not text.isdigit() or int(text) == 0:
        raise TrainingError(
            f"{PROCESSES_VARIABLE}={text!r} is not a number of processes", fix="set it to 1 or more"
        )
    return int(text)


def launch(job: Mapping[str, Any], *, port: int = 0) -> None:
    """Run ``dpo.train.worker`` in every process and wait for all of them.

    Args:
        job: What the worker reads, as JSON values.
        port: Of the rendezvous on this host; 0 takes a free one.

    Raises:
        DpoError: that of the first process that failed; the others are ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _raise_open_files()
    n_hosts = int(os.environ.get("PET_NNODES") or 1)
    endpoint = os.environ.get("PET_RDZV_ENDPOINT") or f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        file.write_text(json.dumps(dict(job)), encoding="utf-8")
        config = LaunchConfig(
            min_nodes=n_hosts,
            max_nodes=n_hosts,
            nproc_per_node=processes_here(),
            run_id=os.environ.get("PET_RDZV_ID") or "dpo",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            max_restarts=0,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "dpo.train.worker", str(file))
        except ChildFailedError as error:
            raise _first_error(Path(folder), error) from None


def _first_error(folder: Path, error: Any) -> DpoError:
    """The message of the process that failed first, as it wrote it; else how it ended."""
    found = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if found:
        values = json.loads(found[0].read_text(encoding="utf-8"))
        kind = getattr(dpo.errors, values.pop("kind"), TrainingError)
        problem: DpoError = kind(values["found"], where=values["where"], fix=values["fix"])
        return problem
    rank, failure = error.get_first_failure()
    return TrainingError(
        f"training process {rank} ended with exit code {failure.exitcode}",
        where=f"host {os.uname().nodename}, rank {rank}",
        fix="look at the log above; -9 is usually the system running out of memory",
    )


def report_error(job_file: Path, rank: int, error: DpoError) -> None:
    """Leave an error where ``launch`` finds it."""
    values = {
        "kind": type(error).__name__,
        "found": error.found,
        "where": error.where,
        "fix": error.fix,
    }
    path = job_file.with_name(f"error-{rank}.json")
    path.write_text(json.dumps(values), encoding="utf-8")


def only_first_reports_progress(rank: int) -> None:
    """One bar for the run, not one for each process."""
    if rank:
        os.environ.pop(FILE_VARIABLE, None)


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
