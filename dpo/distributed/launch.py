"""Starts the processes of one stage: torchrun's agent, called from a function.

Hosts are described by the variables that torchrun and Kubeflow's trainers use: ``PET_NNODES``,
``PET_NODE_RANK``, ``PET_RDZV_ENDPOINT`` (or ``PET_MASTER_ADDR`` and ``PET_MASTER_PORT``),
``PET_RDZV_ID`` and ``PET_LOCAL_ADDR``. Without them all processes are on this host.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dpo.errors
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, stage_json
from dpo.errors import DpoError, TrainingError, TrainingStopped, stopped_outside_of_steps
from dpo.storage.host_memory import prepare
from dpo.storage.progress import FILE_VARIABLE

PROCESSES_VARIABLE = "DPO_PROCESSES"
"""Number of processes on this host; one a GPU, or one, when it is not set."""
LOST = "lost"
"""Key of an error that only says that another process is gone; the other's own comes first."""
_OPEN_FILES = 1 << 16
_STOP = "stop"
"""File beside the job: whoever begins after it was made ends."""
_PORT = 29500
"""Of the first host, where none is named; torchrun's own."""
_TORCHS_SIGNALS = ("SIGINT", "SIGHUP", "SIGQUIT")
"""Torchrun's agent takes them. SIGTERM goes to the processes, which write a checkpoint first."""
_USUAL = {
    signal.SIGKILL: "; it is usually the system running out of memory",
    signal.SIGABRT: "; on GPUs it is usually NCCL, which ends a process whose collective operation "
    "was not finished in process_timeout_seconds: a GPU failed or hangs, or another process is "
    "behind",
}
"""Why a process usually ends by a signal."""
_SHUTDOWN_SECONDS = 10
"""What a process gets between the request to end and SIGKILL; torch 2.13 takes 30 s where another
process has failed."""


def processes_here() -> int:
    """How many processes this host takes.

    Raises:
        TrainingError: the variable holds no positive number.
    """
    for variable in (PROCESSES_VARIABLE, "PET_NPROC_PER_NODE"):
        text = os.environ.get(variable, "")
        if not text or (variable != PROCESSES_VARIABLE and not text.isdigit()):
            # torchrun also takes words such as "auto" and "gpu": what we do anyway
            continue
        if not text.isdigit() or int(text) == 0:
            raise TrainingError(
                f"{variable}={text!r} is not a number of processes", fix="set it to 1 or more"
            )
        return int(text)
    n_gpus: int = torch.cuda.device_count()
    return max(1, n_gpus)


def n_hosts() -> int:
    """How many hosts train together."""
    return int(os.environ.get("PET_NNODES") or 1)


def is_shared(config: RunConfig) -> bool:
    """Whether processes are to be started that each do a share of the pairs and prompts.

    Hosts that train together each do all of it, and so does a BasicTrainer's one process.
    """
    alone = config.trainer.name == "BasicTrainer" or n_hosts() > 1
    return not alone and not dist.is_initialized() and processes_here() > 1


def launch(
    run: Callable[..., object],
    stage: Stage,
    config: RunConfig,
    paths: Mapping[str, Path | None],
    code: str,
    *,
    port: int = 0,
    timeout_seconds: int = 600,
) -> bool:
    """Call ``run`` in every process (``dpo.distributed.worker``) and wait for all of them.

    Args:
        run: A function of a module, ``run(config, output, **paths, code=code)``.
        stage: Whose settings it is given.
        config: Its settings.
        paths: Its inputs and its output, by the names of the stage's arguments.
        code: Fingerprint of the code, kept in the manifest.
        port: Of the rendezvous on this host; 0 takes a free one.
        timeout_seconds: How long a host or a process may keep the others waiting.

    Returns:
        Whether the process that writes the output was on this host.

    Raises:
        DpoError: that of the first process that failed; the others are ended.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    _raise_open_files()
    prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        agent = _launch_config(port, timeout_seconds, logs=name)
        file = folder / "job.json"
        job = {
            "run": [run.__module__, run.__qualname__],
            "stage": stage,
            "settings": stage_json(config, stage, key_only=False),
            "paths": {name: str(path) if path else "" for name, path in paths.items()},
            "code": code,
            "timeout_seconds": timeout_seconds,
            "launcher": os.getpid(),
        }
        file.write_text(json.dumps(job), encoding="utf-8")
        with _pass_on_sigterm(folder) as asked:
            try:
                elastic_launch(agent, sys.executable)("-m", "dpo.distributed.worker", str(file))
            except ChildFailedError as error:
                raise _first_error(folder, error, stage if asked else None) from None
            except (RendezvousError, DistError) as error:
                raise _no_rendezvous(agent, error, timeout_seconds) from None
            except SignalException as error:
                raise KeyboardInterrupt(f"ended by {error.sigval.name}") from None
        return _process_file(folder, 0).exists()


def _launch_config(port: int, timeout_seconds: int, logs: str | None = None) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    hosts = n_hosts()
    endpoint = os.environ.get("PET_RDZV_ENDPOINT")
    if not endpoint and hosts > 1 and (first := os.environ.get("PET_MASTER_ADDR")):
        endpoint = f"{first}:{os.environ.get('PET_MASTER_PORT') or _PORT}"
    rendezvous: dict[str, Any] = {"timeout": timeout_seconds, "join_timeout": timeout_seconds}
    rendezvous["read_timeout"] = timeout_seconds
    number = os.environ.get("PET_NODE_RANK", "")
    static = hosts > 1 and number.isdigit() and endpoint is not None
    if static:
        # torch's "c10d" writes to the store when it ends: where the first host has become
        # unreachable, this host then waits for the system to give the connection up, for minutes
        rendezvous["rank"] = int(number)
        endpoint = endpoint if ":" in str(endpoint) else f"{endpoint}:{_PORT}"
    return LaunchConfig(
        min_nodes=hosts,
        max_nodes=hosts,
        nproc_per_node=processes_here(),
        run_id=os.environ.get("PET_RDZV_ID") or "dpo",
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=endpoint or f"127.0.0.1:{port}",
        rdzv_configs=rendezvous,
        max_restarts=0,
        # else torch makes a folder in the system's temporary one, and leaves it there
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        monitor_interval=0.1,
        # a host alone need not find its own name
        local_addr=os.environ.get("PET_LOCAL_ADDR") or (None if hosts > 1 else "127.0.0.1"),
        signals_to_handle=",".join(_TORCHS_SIGNALS),
        **_shutdown(LaunchConfig),
    )


def _shutdown(config: type) -> dict[str, int]:
    """torch 2.11 has no such setting, and waits 30 s."""
    name = "shutdown_timeout"
    return {name: _SHUTDOWN_SECONDS} if name in inspect.signature(config).parameters else {}


@contextmanager
def _pass_on_sigterm(folder: Path) -> Iterator[list[int]]:
    """Hand SIGTERM to the processes on this host; what is yielded is not empty once it came.

    Afterwards all signals do what they did before; torch's agent keeps those that it takes.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        # first: a process that says its number later looks for it
        with suppress(OSError):
            # on a full disk the others are told all the same
            (folder / _STOP).touch()
        for file in folder.glob("process-*"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text(encoding="utf-8")), signal.SIGTERM)

    numbers = [signal.SIGTERM, *(signal.Signals[name] for name in _TORCHS_SIGNALS)]
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_error(folder: Path, error: Any, stopped: Stage | None) -> DpoError:
    """The message of the process that failed first, as it wrote it; else how it ended.

    Args:
        folder: With what the processes wrote.
        error: What torch says of them.
        stopped: The stage, where it was asked to stop.
    """
    found = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    own = [report for report in reports if not report.pop(LOST)]
    if own:
        return _restored(own[0])
    if stopped in ("sft", "preference"):
        return stopped_outside_of_steps()
    if stopped:
        return TrainingStopped(
            f"{stopped} was asked to stop; nothing half-written was kept",
            fix="run the same command again",
        )
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0 or not reports:
        name = ""
        with suppress(ValueError):
            # a code above 0 is none of a signal, and real-time signals have no names
            name = f" ({signal.Signals(-failure.exitcode).name})"
        return TrainingError(
            f"process {rank} ended with exit code {failure.exitcode}{name}",
            where=f"host {os.uname().nodename}, rank {rank}",
            fix=f"look at the log above{_USUAL.get(-failure.exitcode, '')}. The same command goes "
            "on from the last checkpoint",
        )
    return _restored(reports[0])


def _restored(report: dict[str, Any]) -> DpoError:
    kind = getattr(dpo.errors, report["kind"], TrainingError)
    problem: DpoError = kind(report["found"], where=report["where"], fix=report["fix"])
    return problem


def _no_rendezvous(config: Any, error: Exception, timeout_seconds: int) -> TrainingError:
    reason = " ".join(str(error.__cause__ or error).split())[:200]
    return TrainingError(
        f"the {config.max_nodes} hosts did not find each other within {timeout_seconds} s: "
        f"{reason or type(error).__name__}",
        where=f"rendezvous {config.rdzv_endpoint}, host {os.uname().nodename}",
        fix="check that every host was started with the same PET_NNODES, PET_RDZV_ENDPOINT and "
        "PET_RDZV_ID and reaches that port; process_timeout_seconds sets the wait",
    )


def report_error(job_file: Path, rank: int, error: DpoError, *, lost: bool = False) -> None:
    """Leave an error where ``launch`` finds it; ``lost``: another process was the cause."""
    values = {
        "kind": type(error).__name__,
        "found": error.found,
        "where": error.where,
        "fix": error.fix,
        LOST: lost,
    }
    path = job_file.with_name(f"error-{rank}.json")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(path)


def announce(job_file: Path, rank: int) -> None:
    """Leave the number of this process where ``launch`` finds it; end where it is to stop."""
    _process_file(job_file.parent, rank).write_text(str(os.getpid()), encoding="utf-8")
    if job_file.with_name(_STOP).exists():
        # it came before this process could be told
        os.kill(os.getpid(), signal.SIGTERM)


def _process_file(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}"


def only_first_reports_progress(rank: int) -> None:
    """One bar and one set of messages for the run, not one for each process."""
    if rank:
        os.environ[FILE_VARIABLE] = os.devnull


def _raise_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
