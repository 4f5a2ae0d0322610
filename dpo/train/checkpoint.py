"""Checkpoints of a training run that goes on, and going on from them.

    <folder>/identity.json   settings, inputs and code of the run that they belong to
    <folder>/step-N/         weights, optimiser, position; complete when its manifest is there
    <folder>/LATEST          name of the newest complete one

They are written while training goes on, from a copy of the tensors, one at a time. A run that was
ended at any moment continues from the newest complete one with the same weights, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dpo.data.loader import LoaderState
from dpo.errors import ArtifactError, ConfigError
from dpo.storage.manifest import read_manifest, staged, write_atomically, write_manifest
from dpo.storage.progress import message
from dpo.train.log import FILE as METRICS

ROOT_VARIABLE = "DPO_CHECKPOINTS"
"""Environment variable with the folder under which the steps of a pipeline keep checkpoints."""
LATEST = "LATEST"
_POSITION = "position.json"
_TENSORS = "tensors"
_SHOWN_DIFFERENCES = 5

Resume = Literal["auto", "force", "never"]


@dataclass
class Position:
    """How far a run has come, beside its tensors."""

    steps: int = 0
    trained: int = 0
    loader: LoaderState = field(default_factory=LoaderState)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)


@dataclass
class Checkpoints:
    """The checkpoints of one run in ``folder``."""

    folder: Path
    identity: Mapping[str, Any]
    """What decides the result: settings, content hashes of the inputs, code."""
    keep: int
    resume: Resume = "auto"
    _pending: Future[Any] | None = None
    _finish: Any = None
    save_seconds: float = 0.0
    """Time for which training stood still because of checkpoints."""

    def find(self) -> Path | None:
        """The newest complete checkpoint of the same run, if there is one.

        Raises:
            ConfigError: the checkpoints are those of a run with other settings, data or code.
        """
        if self.resume == "never":
            if is_first():
                shutil.rmtree(self.folder, ignore_errors=True)
            return None
        if not self._numbered():
            return None
        self._check_identity()
        for path in reversed(self._numbered()):
            try:
                read_manifest(path, stage="checkpoint")
            except ArtifactError as error:
                message("train", f"{path.name} is not used: {error.found}")
                continue
            return path
        return None

    def load(self, path: Path, model: Any, optimizer: torch.optim.Optimizer) -> Position:
        """Put a checkpoint into model and optimiser; returns where it stands.

        Raises:
            ArtifactError: it does not fit the model.
        """
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}
        try:
            dcp.load(state, checkpoint_id=path / _TENSORS, no_dist=not dist.is_initialized())
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"the checkpoint does not fit this run: {reason}",
                where=str(path),
                fix="remove the folder to begin again",
            ) from None
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        torch.set_rng_state(state["rng"])
        values = json.loads((path / _POSITION).read_text(encoding="utf-8"))
        return Position(**{**values, "loader": LoaderState(**values["loader"])})

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        position: Position,
        metrics: Path,
    ) -> None:
        """Begin to write a checkpoint; an earlier one is finished first."""
        began = time.monotonic()
        self.finish()
        if is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "identity.json", _canonical(self.identity))
        target = self.folder / f"step-{position.steps}"
        partial = self.folder / f".step-{position.steps}.partial"
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            values = json.dumps(asdict(position))
            (partial / _POSITION).write_text(values, encoding="utf-8")
            shutil.copyfile(metrics, partial / METRICS)
        barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}
        # said by the thread that writes: that a process is alone is known and meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # async_save copies the tensors before it returns
        self._pending = dcp.async_save(
            state,
            checkpoint_id=partial / _TENSORS,
            process_group=_saving_group(),
            no_dist=not dist.is_initialized(),
        )
        self._finish = (partial, target)
        self.save_seconds += time.monotonic() - began

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and declare it complete."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.result()
        partial, target = self._finish
        if is_first():
            with staged(target) as folder:
                folder.rmdir()
                partial.rename(folder)
                write_manifest(folder, "checkpoint")
            write_atomically(self.folder / LATEST, f"{target.name}\n")
            for old in self._numbered()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove them: the run's artifact is complete."""
        if is_first():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _numbered(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def _check_identity(self) -> None:
        path = self.folder / "identity.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        now = json.loads(_canonical(self.identity))
        differences = [
            f"{key}: {known.get(key)!r} → {now.get(key)!r}"
            for key in sorted({*known, *now})
            if known.get(key) != now.get(key)
        ]
        if not differences or self.resume == "force":
            return
        shown = "\n    ".join(differences[:_SHOWN_DIFFERENCES])
        raise ConfigError(
            f"the checkpoints are those of another run:\n    {shown}",
            where=str(self.folder),
            fix="set resume=force to go on with them all the same, or resume=never to begin again",
        )


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


_group: Any = None


def _saving_group() -> Any:
    """A gloo group of its own: saving on the group of the training aborts or hangs (torch 2.13)."""
    global _group
    if dist.is_initialized() and _group is None:
        _group = dist.new_group(backend="gloo")
    return _group


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, indent=1)


def place_of(name: str, identity: Mapping[str, Any]) -> Path | None:
    """Where a step of the pipeline keeps its checkpoints: a folder for each identity."""
    import hashlib

    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        return None
    digest = hashlib.sha256(_canonical(identity).encode()).hexdigest()[:24]
    return Path(root) / f"{name}-{digest}"
