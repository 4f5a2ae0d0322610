"""The metric log: one JSON line for each optimiser step and each evaluation; and the samples."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dpo.config.schema import RunConfig
from dpo.errors import MissingDependency, TrainingError, system_problem
from dpo.storage.progress import message

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class Sink(Protocol):
    """Where figures go beside the file."""

    def write(self, values: Mapping[str, Any]) -> None:
        """The figures of a step or of an evaluation."""

    def close(self) -> None:
        """No more of them."""


class MetricLog:
    """Appends lines to ``metrics.jsonl``; each is whole on disk before the next step begins.

    Args:
        folder: Where.
        begin: Folder with the lines of a run that goes on, without those of steps that are done
            again.
    """

    def __init__(self, folder: Path, *, begin: Path | None = None) -> None:
        self.path = folder / FILE
        self._samples = folder / SAMPLES
        for path in (self.path, self._samples):
            if begin is not None and (begin / path.name).is_file():
                shutil.copyfile(begin / path.name, path)
        self._file = self.path.open("a", encoding="utf-8")
        self.sinks: list[Sink] = []

    def write(self, values: dict[str, Any]) -> None:
        """One line; what is not finite is null in it, for JSON knows no NaN."""
        finite = {k: v if _is_finite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        for sink in self.sinks:
            sink.write(values)

    def write_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """A line for each answer, in ``samples.jsonl`` beside it."""
        with self._samples.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def texts(self) -> dict[str, str]:
        """What was written so far, by name of the file."""
        paths = [path for path in (self.path, self._samples) if path.is_file()]
        return {path.name: path.read_text("utf-8") for path in paths}

    def close(self) -> None:
        """No more lines."""
        self._file.close()
        for sink in self.sinks:
            sink.close()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def open_sinks(config: RunConfig, stage: str, folder: Path, settings: dict[str, Any]) -> list[Sink]:
    """What the settings ask for beside the file; nothing of wandb in a debug run.

    Args:
        config: Settings.
        stage: ``sft`` or ``preference``.
        folder: Where wandb keeps its files.
        settings: What is recorded with the run.

    Raises:
        MissingDependency: a package that is asked for is not installed.
        TrainingError: wandb does not begin.
    """
    sinks: list[Sink] = []
    if config.tensorboard is not None:
        sinks.append(TensorBoardLog(Path(config.tensorboard).expanduser(), config.exp_name, stage))
    if config.wandb.enabled and not config.debug:
        sinks.append(WandbLog(config, folder, settings))
    return sinks


class TensorBoardLog:
    """Every figure as a scalar, by number of examples, in a folder of the run and its stage.

    A run that goes on appends to what is there and hides the steps that are done again. Where the
    folder can no longer be written to, training goes on without it.

    Raises:
        MissingDependency: tensorboard is asked for and not installed.
    """

    def __init__(self, root: Path, name: str, stage: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependency(
                "tensorboard is set, but the package tensorboard is not installed",
                where="tensorboard",
                fix="pip install tensorboard, or leave the setting out",
            ) from None
        self._folder, self._stage = root / name / stage, stage
        self._make = SummaryWriter
        self._writer: Any = None
        self._failed = False

    def write(self, values: Mapping[str, Any]) -> None:
        """One point of each figure."""
        if self._failed:
            return
        examples = values.get("counters/examples", 0)
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=examples)
            self._hook, threading.excepthook = threading.excepthook, self._of_a_thread
        with self._going_on():
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, examples)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            with self._going_on():
                self._writer.close()
            threading.excepthook = self._hook

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                reason = system_problem(error).found
                where = f"TensorBoard's folder {self._folder}"
                message(self._stage, f"{where} gets no more figures ({reason}); training goes on")
            self._failed = True

    def _of_a_thread(self, problem: threading.ExceptHookArgs) -> None:
        """What TensorBoard's thread ends with is raised again by the next write."""
        if type(problem.thread).__module__.partition(".")[0] != "tensorboard":
            self._hook(problem)


class WandbLog:
    """The same figures in Weights & Biases, at most one point an interval.

    Raises:
        MissingDependency: wandb is asked for and not installed.
        TrainingError: it does not begin.
    """

    def __init__(self, config: RunConfig, folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingDependency(
                "wandb.enabled=true, but wandb is not installed",
                where="wandb.enabled",
                fix="pip install wandb, or leave it out; WANDB_MODE=offline needs no server",
            ) from None
        try:
            self._run = wandb.init(
                entity=config.wandb.entity,
                project=config.wandb.project,
                name=config.exp_name,
                config=settings,
                dir=str(folder),
            )
        except wandb.Error as error:
            # no key, or a server that refuses it or does not answer
            raise TrainingError(
                f"Weights & Biases does not begin: {' '.join(str(error).split())[:200]}",
                where="wandb.enabled",
                fix="run `wandb login`, set WANDB_MODE=offline, or leave wandb out",
            ) from None
        self._interval = config.minimum_log_interval_secs
        self._last = float("-inf")
        self._left: Mapping[str, Any] | None = None

    def write(self, values: Mapping[str, Any]) -> None:
        """One point, unless the last one is too recent; evaluations are always written, and so is
        the point before each and the last of all."""
        now = time.monotonic()
        evaluated = "loss/eval" in values
        if not evaluated and now - self._last < self._interval:
            self._left = values
            return
        if evaluated:
            self._write_left()
        self._last, self._left = now, None
        self._send(values)

    def close(self) -> None:
        """Send what is left."""
        self._write_left()
        self._run.finish()

    def _write_left(self) -> None:
        if self._left is not None:
            self._send(self._left)
            self._left = None

    def _send(self, values: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in values.items() if isinstance(v, int | float)})
