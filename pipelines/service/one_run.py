"""One pipeline run in a process of its own; started by the worker with the folder of its job.

    job.json       what to run
    runs/          the run's artifacts, cache and history, as ``pipelines.local`` lays them out
    outcome.json   how it ended, written last

A process of its own because a run is cancelled by ending it, and must not outlive its worker.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from dpo.errors import DpoError
from dpo.storage.manifest import write_atomically
from dpo.storage.processes import die_with_parent
from pipelines import package
from pipelines.local import Job, locked
from pipelines.outcome import Outcome
from pipelines.run import run_here

JOB, OUTCOME, RUNS = "job.json", "outcome.json", "runs"
_OLD_RUN_SECONDS = 30.0


def main(folder: Path, parent: int) -> int:
    """Run the job in ``folder`` for a process; 0 when it ended by itself, however it ended."""
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, _interrupt)
    values: dict[str, Any] = json.loads((folder / JOB).read_text(encoding="utf-8"))
    try:
        _wait_for_old_run(folder / RUNS)
        job = Job(package.load_package(), values, folder / RUNS)
        with Path(os.devnull).open("w") as nowhere:
            outcome = run_here(job, Console(file=nowhere))
    except DpoError as error:
        outcome = Outcome("failed", "", message=str(error))
    except KeyboardInterrupt:
        return 130
    write_atomically(folder / OUTCOME, json.dumps(asdict(outcome), sort_keys=True))
    return 0


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wait_for_old_run(runs: Path) -> None:
    """After a crash the last steps of the killed run may need a moment to end.

    Raises:
        PipelineError: they do not end.
    """
    deadline = time.monotonic() + _OLD_RUN_SECONDS
    while True:
        try:
            with locked(runs):
                return
        except DpoError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
