"""What one of several processes of a stage does; ``dpo.distributed.worker`` calls it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo.config.stages import load_stage
from dpo.distributed.device import best_device
from dpo.distributed.heartbeat import Heartbeat
from dpo.distributed.launch import announce, only_first_reports_progress, report_error
from dpo.distributed.together import connect
from dpo.errors import DpoError, TrainingError, system_problem
from dpo.storage.processes import die_with_parent

_BROKEN = ("connection", "timed out", "timeout", "peer", "socket", "gloo", "nccl")
"""Words of the errors that a process gets when another one is gone."""


def main(job_file: Path) -> int:
    """Do what ``job_file`` says; returns the exit code."""
    try:
        job = json.loads(job_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        # the launcher ended meanwhile, and took its folder with it
        return 1
    die_with_parent(int(job["launcher"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    announce(job_file, rank)
    only_first_reports_progress(rank)
    timeout = float(job["timeout_seconds"])

    def report(error: DpoError, *, lost: bool = False) -> int:
        report_error(job_file, rank, error, lost=lost)
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code

    def end(silent: str) -> None:
        report(_silence(silent, timeout), lost=True)
        # the main thread waits in a collective operation that will not end
        os._exit(1)

    heart = Heartbeat(rank, world, timeout, end)
    heart.start()
    try:
        _connect(timeout)
        _run(job)
    except DpoError as error:
        return report(error)
    except OSError as error:
        return report(system_problem(error))
    except Exception as error:
        return _other(error, heart, report, timeout)
    heart.stop()
    dist.destroy_process_group()
    return 0


def _connect(timeout_seconds: float) -> None:
    on_gpus = best_device() == "cuda"
    if on_gpus:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    connect("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout_seconds)


def _take_gpu(number: int) -> None:
    """Make the GPU of that number this process's own.

    Raises:
        TrainingError: there are fewer.
    """
    n_gpus = torch.cuda.device_count()
    if number >= n_gpus:
        # NCCL refuses two processes on one GPU
        raise TrainingError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes for {n_gpus} GPUs of this host",
            where=f"host {os.uname().nodename}",
            fix=f"set DPO_PROCESSES to at most {n_gpus}, or leave it out",
        )
    torch.cuda.set_device(number)


def _run(job: dict[str, Any]) -> None:
    paths = {name: Path(value) if value else None for name, value in job["paths"].items()}
    module, function = job["run"]
    run = getattr(importlib.import_module(module), function)
    config = load_stage(job["stage"], job["settings"])
    run(config, paths.pop("output"), **paths, code=job["code"])


def _silence(silent: str, timeout_seconds: float) -> TrainingError:
    return TrainingError(
        f"no answer for {timeout_seconds:.0f} s from {silent}",
        where=silent,
        fix="look at that process and its host; process_timeout_seconds sets the wait. The same "
        "command goes on from the last checkpoint",
    )


def _other(
    error: Exception, heart: Heartbeat, report: Callable[..., int], timeout_seconds: float
) -> int:
    """An error of torch's: where another process is the cause, it is named; else it is a bug."""
    reason = " ".join(str(error).split())
    if not any(word in reason.lower() for word in _BROKEN):
        traceback.print_exc()
        return report(
            TrainingError(
                f"{type(error).__name__}: {reason[:300]}",
                where=f"host {os.uname().nodename}, rank {os.environ['RANK']}",
                fix="the traceback is in the log above; report a bug if it is one",
            )
        )
    # whoever is asked to end meanwhile, because another process failed here, ends now
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    late = ""
    if "time" in reason.lower():
        # an operation and the heartbeat wait as long: whichever tells first, the words are the same
        if silent := heart.silent(timeout_seconds - 2 * heart.interval):
            return report(_silence(silent, timeout_seconds), lost=True)
        late = heart.behind()
    gone = late or heart.wait_for_silence(min(timeout_seconds, 5.0))
    what = gone or "another process"
    return report(
        TrainingError(
            f"the connection to {what} broke, or it did not answer for {timeout_seconds:.0f} s",
            where=f"{gone or 'unknown'}; seen by rank {os.environ['RANK']} as: {reason[:200]}",
            fix="look at that process's log. The same command goes on from the last checkpoint",
        ),
        lost=True,
    )
