"""The metric log: one JSON line for each optimiser step and each evaluation."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.errors import MissingDependency

FILE = "metrics.jsonl"


class MetricLog:
    """Appends lines to ``metrics.jsonl``; each is whole on disk before the next step begins."""

    def __init__(self, folder: Path, *, begin: Path | None = None) -> None:
        self.path = folder / FILE
        if begin is not None:
            # a resumed run: its lines so far, without those of steps that are done again
            shutil.copyfile(begin, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self.also: WandbLog | None = None
        """Where figures go beside the file."""

    def write(self, values: dict[str, Any]) -> None:
        """One line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self.also:
            self.also.write(values)

    def close(self) -> None:
        """No more lines."""
        self._file.close()
        if self.also:
            self.also.close()


class WandbLog:
    """The same figures in Weights & Biases, at most one point an interval.

    Raises:
        MissingDependency: wandb is asked for and not installed.
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
        self._run = wandb.init(
            entity=config.wandb.entity,
            project=config.wandb.project,
            name=config.exp_name,
            config=settings,
            dir=str(folder),
        )
        self._interval = config.minimum_log_interval_secs
        self._last = float("-inf")

    def write(self, values: dict[str, Any]) -> None:
        """One point, unless the last one is too recent; evaluations are always written."""
        now = time.monotonic()
        if "loss/eval" in values or now - self._last >= self._interval:
            self._last = now
            self._run.log({k: v for k, v in values.items() if isinstance(v, int | float)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()
