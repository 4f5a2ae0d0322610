"""Runs the compiled pipeline on this machine: kfp.local, in processes or in containers.

Everything a run leaves is in one folder (``runs/`` by default):

    artifacts/   outputs of steps, as kfp.local lays them out
    checkpoints/ of training steps that were ended; removed when they are complete
    cache/       kfp.local's cache: which outputs belong to which inputs
    history/     one folder a run: its log, its progress events and run.json
    published/   the default store
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo.config.parameters import stage_configs
from dpo.config.stages import OUT_OF_BAND_VARIABLE, out_of_band
from dpo.errors import DpoError, RequestError
from dpo.storage import host_memory, progress
from dpo.storage.manifest import write_atomically
from pipelines import containers
from pipelines.artifacts import Artifacts, drop_broken_cache_entries
from pipelines.deployment import CHECKPOINTS_VARIABLE
from pipelines.display import Display, RunView
from pipelines.local_worker import ENDED_WITH
from pipelines.package import save_package, steps_of

_POLL_SECONDS = 0.2
_STOP_SECONDS = 40.0
"""For a training step to end its optimiser step and to write a checkpoint."""
_TOLD_AFTER_SECONDS = 2.0
_LEAST_FREE_BYTES = 1 << 16
_ENDED = re.compile(rf"{ENDED_WITH}(-?\d+)$")
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class LocalRun:
    """How a local run ended and where its parts are."""

    run_id: str
    folder: Path
    """The run's folder in ``history/``."""
    succeeded: bool
    states: dict[str, str]
    """State of each step: done, cached, failed or skipped."""
    seconds: dict[str, float]
    """Time of each executed step."""
    artifacts: dict[str, Path]
    """Output folder of each step that has one."""
    message: str = ""
    """Why it failed."""
    exit_code: int = 0


@dataclass
class Job:
    """A run to be made."""

    documents: list[dict[str, Any]]
    parameters: Mapping[str, Any]
    runs: Path
    runner: str = "processes"
    """``processes`` or ``docker``."""


def run_local(
    job: Job,
    console: Console,
    *,
    timeout_seconds: float | None = None,
    at_end: Callable[[Path, Mapping[str, str]], None] = lambda _folder, _states: None,
) -> LocalRun:
    """Run a package here and wait for its end.

    Args:
        job: What to run.
        console: Where to show it.
        timeout_seconds: None waits as long as it takes.
        at_end: Is given the run's folder in ``history/`` and the state of each step, also where
            the run was stopped.

    Raises:
        RequestError: another run is using the same folder, or an image is missing.
        TimeoutError: the time is over; the steps were stopped.
        KeyboardInterrupt: after the steps were stopped.
    """
    if job.runner == "docker":
        containers.check_images(job.documents)
    with locked(job.runs) as lock:
        if job.runner == "docker":
            containers.end_left(job.runs)
        drop_broken_cache_entries(job.runs / "cache")
        # the store may be shared by machines, so the second alone would not do
        run_id = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        folder = job.runs / "history" / run_id
        folder.mkdir(parents=True)
        events = folder / "progress.jsonl"
        started = time.time()
        worker = _start_worker(job, folder, events, lock)
        view = RunView.of(steps_of(job.documents))
        try:
            _watch(worker, events, Display(view, console), timeout_seconds)
        finally:
            _stop(worker, console, run_id if job.runner == "docker" else None)
            if job.runner == "docker":
                containers.stop_containers(run_id)
            view.finish()
            with suppress(OSError):
                # the run is what it is, also where its record does not fit on the disk
                at_end(folder, view.states)
        succeeded = worker.returncode == 0
        run = _outcome(job, folder, run_id, view, succeeded, started)
        with suppress(OSError):
            _record(run, job)
        return run


def _start_worker(job: Job, folder: Path, events: Path, lock: int) -> subprocess.Popen[bytes]:
    save_package(job.documents, folder / "package.yaml")
    description = {
        "run_id": folder.name,
        "package": str(folder / "package.yaml"),
        "arguments": dict(job.parameters),
        "pipeline_root": str(job.runs / "artifacts"),
        "cache_root": str(job.runs / "cache"),
        "runner": job.runner,
        "docker": containers.container_settings(
            folder.name, job.runs, events, job.parameters, containers.own_user()
        )
        if job.runner == "docker"
        else {},
    }
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(description, indent=1), encoding="utf-8")
    environment = {
        **host_memory.VARIABLES,
        **os.environ,
        progress.FILE_VARIABLE: str(events),
        # dpo.train.place reads it; steps go on from here when a run was ended
        CHECKPOINTS_VARIABLE: os.environ.get(CHECKPOINTS_VARIABLE) or str(job.runs / "checkpoints"),
        "PYTHONUNBUFFERED": "1",
        **own_code(),
        **_out_of_band(job),
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
    }
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.local_worker", str(job_file), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # a group of its own: Ctrl-C reaches this process alone, which then ends the group
            start_new_session=True,
            # the lock is held until the last process of the run is gone
            pass_fds=(lock,),
        )


def own_code() -> dict[str, str]:
    """Variables with which a process finds the sources beside this file, wherever it is started.

    It is started in the folder of the user, whose relative paths mean that folder, and where a
    file of theirs (``random.py``) must not be taken for a module.
    """
    sources = str(Path(__file__).resolve().parent.parent)
    found = [sources, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(found), "PYTHONSAFEPATH": "1"}


def _out_of_band(job: Job) -> dict[str, str]:
    """Settings that change no result: by the environment, so that changing one reruns nothing."""
    if job.runner != "processes":
        return {}
    return {OUT_OF_BAND_VARIABLE: out_of_band(stage_configs(job.parameters))}


def _watch(
    worker: subprocess.Popen[bytes], events: Path, display: Display, timeout_seconds: float | None
) -> None:
    deadline = time.monotonic() + timeout_seconds if timeout_seconds else None
    offset = 0
    with display.shown():
        while True:
            ended = worker.poll() is not None
            found, offset = progress.read_events(events, offset)
            for event in found:
                display.view.apply(event)
            display.update()
            if ended:
                return
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_POLL_SECONDS)


def _stop(
    worker: subprocess.Popen[bytes], console: Console, in_containers: str | None = None
) -> None:
    """End the worker and its steps: politely, then not. Ctrl-C meanwhile ends the patience.

    Args:
        worker: Of the run.
        console: Is told when it takes a while.
        in_containers: The run's id where its steps are containers, which no signal to us reaches.
    """
    if worker.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            if in_containers:
                containers.stop_containers(in_containers, "SIGTERM")
            with suppress(subprocess.TimeoutExpired):
                worker.wait(_TOLD_AFTER_SECONDS)
                return
            console.print(
                "Ending: a training step writes a checkpoint first (Ctrl-C again does not wait) ..."
            )
            worker.wait(_STOP_SECONDS)
            return
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def _outcome(
    job: Job, folder: Path, run_id: str, view: RunView, succeeded: bool, started: float
) -> LocalRun:
    message, exit_code = "", 0
    if not succeeded:
        message, exit_code = _failure(folder, view)
        if job.runner == "docker" and view.error is None:
            # of its absence the log has a traceback of the packages that asked it
            message = containers.engine_gone() or message
    return LocalRun(
        run_id=run_id,
        folder=folder,
        succeeded=succeeded,
        states=view.states,
        seconds={name: round(s.seconds, 1) for name, s in view.steps.items() if s.started},
        artifacts=Artifacts(job.runs / "artifacts").of_run(started) if succeeded else {},
        message=message,
        exit_code=exit_code,
    )


def _failure(folder: Path, view: RunView) -> tuple[str, int]:
    log = folder / "log.txt"
    if view.error is not None and not view.error.get("bug"):
        return f"step {view.error['step']}: {view.error['text']}", view.error["exit_code"]
    if shutil.disk_usage(folder).free < _LEAST_FREE_BYTES:
        # then neither the step's message nor its log could be written
        return str(DpoError("the disk is full", where=str(folder), fix="free space, run again")), 1
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [name for name, step in view.steps.items() if step.state == "failed"]
    if view.error is not None:
        # the log ends with what kfp says of it, in its own colours; the traceback stands before
        what = f"step {view.error['step']}: {view.error['text']}"
        return str(DpoError(what, where=str(log), fix="see the traceback there; it is a bug")), 1
    what, fix = "the run ended unexpectedly", ""
    if failed:
        what, fix, lines = _without_message(failed[0], lines)
    tail = "\n".join(f"  | {_COLOURS.sub('', line)}" for line in lines[-5:] if line.strip())
    return str(DpoError(f"{what}\n{tail}".rstrip(), where=str(log), fix=fix)), 1


def _without_message(step: str, lines: list[str]) -> tuple[str, str, list[str]]:
    """What became of a step that could say nothing, what to do, and the log up to its end."""
    for place, line in enumerate(lines):
        if found := _ENDED.search(line):
            code = int(found[1])
            if code in _KILLED:
                return (
                    f"step {step} was killed (exit code {code}), mostly for want of memory",
                    "give it more memory or less to hold (batch size, max_length), then run the "
                    "same command again: training goes on from its last checkpoint",
                    lines[:place],
                )
            return f"step {step} ended with exit code {code} and no message", "", lines[:place]
    return f"step {step} ended without a message", "", lines


def _record(run: LocalRun, job: Job) -> None:
    record = {
        "run_id": run.run_id,
        "succeeded": run.succeeded,
        "states": run.states,
        "seconds": run.seconds,
        "parameters": dict(job.parameters),
        "artifacts": {name: str(path) for name, path in run.artifacts.items()},
        "message": run.message,
    }
    write_atomically(run.folder / "run.json", json.dumps(record, indent=1, sort_keys=True))


@contextmanager
def locked(runs: Path) -> Iterator[int]:
    """Hold ``runs`` alone; yields the descriptor that holds the lock.

    Raises:
        RequestError: another run holds it, or the folder cannot be written to.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(runs / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RequestError(
            f"the folder for runs cannot be written to: {error.strerror}",
            where=str(runs),
            fix="choose another one with --runs-dir",
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode() or "unknown"
            raise RequestError(
                f"another run is using this folder (process {holder.strip()})",
                where=str(runs),
                fix="wait for it, or use another folder with --runs-dir",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def remove_runs(runs: Path) -> None:
    """Delete what local runs left; the published models too."""
    with locked(runs):
        shutil.rmtree(runs)
