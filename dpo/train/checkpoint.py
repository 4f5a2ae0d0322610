"""Checkpoints of a training run that goes on, and going on from them.

    <place>/identity.json   settings, inputs and code of the run that they belong to
    <place>/step-N/         weights, optimiser, position; complete when its manifest is there
    <place>/LATEST          name of the newest complete one

The place is a folder, or an object store with a folder in front of it. They are written while
training goes on, from a copy of the tensors, one at a time. A run that was ended at any moment
continues from the newest complete one with the same weights, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from dpo.distributed.together import (
    agree,
    gather,
    is_first,
    is_first_of_host,
    saving_group,
    writing_group,
)
from dpo.errors import ArtifactError, ConfigError, DpoError, StoreError, StoreUnavailable
from dpo.storage.manifest import read_manifest, write_atomically, write_manifest
from dpo.storage.mirror import Mirror
from dpo.storage.progress import message
from dpo.train.attempt import Attempt
from dpo.train.period import Period
from dpo.train.place import Place
from dpo.train.position import Position
from dpo.train.unwritten import explain

LATEST = "LATEST"
FORMAT = 2
"""Of what lies in a checkpoint; 1 did not say so."""
_FORMAT_KEY = "format of checkpoints"
IDENTITY = "identity.json"
_POSITION = "position.json"
_TENSORS = "tensors"
_SHOWN_DIFFERENCES = 5

Resume = Literal["auto", "force", "never"]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        place: Where they are.
        identity: What decides the result: settings, content hashes of the inputs, code.
        keep: How many.
        resume: Whether to go on from those that are there.
    """

    def __init__(
        self, place: Place, identity: Mapping[str, Any], keep: int, resume: Resume = "auto"
    ) -> None:
        self.folder = place.folder
        self.identity = {**identity, _FORMAT_KEY: FORMAT}
        self.keep, self.resume = keep, resume
        self.period = Period()
        self.ending = False
        """Training ends with the next one: who waits for it reports what is wrong."""
        self._mirror = Mirror(place.store) if place.store else None
        self._saving: threading.Thread | None = None
        self._problem: DpoError | None = None
        self._attempt = Attempt(place.folder)

    def find(self) -> Path | None:
        """The newest complete checkpoint of the same run, if there is one.

        Raises:
            ConfigError: the checkpoints are those of a run with other settings, data or code.
            ArtifactError: they have a format that this version does not read.
        """
        if is_first_of_host():
            self._attempt.tidy()
        if self.resume == "never":
            self.discard()
            return None
        numbers = agree(self._numbers() if is_first() else [])
        if not numbers:
            return None
        if is_first():
            self.check_identity()
        for number in reversed(numbers):
            path = self.folder / f"step-{number}"
            problem = self._fetch(path) if is_first_of_host() else ""
            # which takes long for many gigabytes
            problems = [text for text in gather(problem, saving_group()) if text]
            if not problems:
                return path
            if is_first():
                message("train", f"{path.name} is not used: {problems[0]}")
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
            # weights that no gradient has reached yet have no state (an image tower, for one)
            _leave_out_unsaved(optimizer_state["state"], path / _TENSORS)
            position = Position.of(json.loads((path / _POSITION).read_text(encoding="utf-8")))
            # returns once every process has read
            dcp.load(state, checkpoint_id=path / _TENSORS, no_dist=not dist.is_initialized())
        except (Exception, dcp.CheckpointException) as error:
            if not path.is_dir():
                raise ArtifactError(
                    "the checkpoint was there and is gone: another run of the same training writes "
                    "to its place",
                    where=str(path),
                    fix="let one of the two end, then run this command again",
                ) from None
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"the checkpoint does not fit this run: {reason}",
                where=str(path),
                fix="set resume=never to begin again",
            ) from None
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            # that all weights were there was seen above
            options=StateDictOptions(strict=False),
        )
        torch.set_rng_state(state["rng"])
        if self._mirror and is_first_of_host():
            # it was fetched for this alone, and is as large as what is to be written here
            shutil.rmtree(path, ignore_errors=True)
        return position

    def save(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        position: Position,
        texts: Mapping[str, str],
    ) -> None:
        """Begin to write a checkpoint; an earlier one is finished first.

        A checkpoint that cannot be written (a full disk, a store that does not answer) is reported
        and left out: the training and the checkpoints before it are as good as they were.

        Args:
            model: Its weights.
            optimizer: Its state.
            position: How far the run has come.
            texts: Further files, by name: what was logged so far.
        """
        self.finish(strict=False)
        began = time.monotonic()
        partial = self._attempt.begin(position.steps)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "rng": torch.get_rng_state()}
        # said by the thread that writes: that a process is alone is known and meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # async_save copies the tensors before it returns
        pending = dcp.async_save(
            state,
            checkpoint_id=partial / _TENSORS,
            process_group=writing_group(),
            no_dist=not dist.is_initialized(),
        )
        texts = {_POSITION: json.dumps(asdict(position)), **texts}
        self._saving = threading.Thread(
            target=self._complete,
            args=(pending, partial, texts),
            name="checkpoint",
            daemon=True,
        )
        self.period.being_written = True
        self._saving.start()
        self.period.stopped_seconds = time.monotonic() - began

    def finish(self, *, strict: bool = True) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            DpoError: it could not be written, and ``strict`` was asked for.
        """
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        problem, self._problem = self._problem, None
        if problem and strict:
            raise problem

    def close(self) -> None:
        """Training ended with an error: one process alone still completes what it has begun."""
        if not dist.is_initialized():
            self.finish(strict=False)
        self._attempt.end()

    def discard(self) -> None:
        """Remove them: the run's artifact is complete."""
        if is_first_of_host():
            shutil.rmtree(self.folder, ignore_errors=True)
        if is_first() and self._mirror:
            self._mirror.clear()

    def _complete(self, pending: Any, partial: Path, texts: Mapping[str, str]) -> None:
        """In a thread: wait for the tensors, add what belongs to them, make it visible."""
        began = time.monotonic()
        target = self.folder / partial.name.split(".")[1]
        parts = [lambda: self._write(pending, partial, texts)]
        if self._mirror:
            parts.append(lambda: self._send(partial, target.name))
        parts += [lambda: self._declare(partial, target), lambda: self._check_shared(target)]
        # another process is gone: the training finds out by itself, and says who
        with suppress(RuntimeError):
            self.period.failed = any(self._failed(part, partial) for part in parts)
        self.period.writing_seconds = time.monotonic() - began
        self.period.being_written = False

    def _failed(self, work: Any, partial: Path) -> bool:
        """Whether ``work`` failed in any process; then it is reported once and cleaned up."""
        problem: DpoError | None = None
        try:
            work()
        except (Exception, dcp.CheckpointException) as error:
            problem = explain(error, partial.parent)
        problems = [found for found in gather(problem, saving_group()) if found]
        if not problems:
            return False
        self._problem = problems[0]
        if is_first_of_host():
            shutil.rmtree(partial, ignore_errors=True)
        if is_first():
            if self._mirror and not isinstance(problems[0], StoreUnavailable):
                # a full store would stay full
                with suppress(StoreError):
                    self._mirror.remove(partial.name.split(".")[1])
            if not self.ending:
                message("train", f"{problems[0]}\n  training goes on; earlier checkpoints are kept")
        return True

    def _write(self, pending: Any, partial: Path, texts: Mapping[str, str]) -> None:
        pending.result()
        if not is_first():
            return
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        # of all files in a folder that all hosts share; else of this host's, and what the other
        # hosts send to the store is compared there
        write_manifest(partial, "checkpoint")
        write_atomically(self.folder / IDENTITY, _canonical(self.identity))

    def _send(self, partial: Path, name: str) -> None:
        if is_first_of_host():
            assert self._mirror is not None
            self._mirror.send(partial, name)

    def _declare(self, partial: Path, target: Path) -> None:
        """The files are where they belong: now the names that make them count."""
        if self._mirror:
            self._declare_in_store(partial, target.name)
            return
        if not is_first():
            return
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        write_atomically(self.folder / LATEST, f"{target.name}\n")
        # those with higher numbers could not be used, or are another run's: not newer than this one
        numbers = [number for number in self._numbers() if number <= _number_of(target.name)]
        for number in numbers[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{number}", ignore_errors=True)

    def _check_shared(self, target: Path) -> None:
        if self._mirror or not is_first_of_host() or target in self.folder.glob("step-*"):
            return
        raise ArtifactError(
            f"host {os.uname().nodename} does not see the checkpoint that the first host wrote",
            where=str(target),
            fix="use a folder that all hosts share, or a store: checkpoint_uri=s3://bucket/prefix",
        )

    def _declare_in_store(self, partial: Path, name: str) -> None:
        assert self._mirror is not None
        if is_first():
            store = self._mirror.store
            store.write(IDENTITY, _canonical(self.identity).encode())
            self._mirror.complete(partial, name)
            store.write(LATEST, f"{name}\n".encode())
            self._mirror.keep_newest(self.keep, _number_of(name))
        if is_first_of_host():
            shutil.rmtree(partial, ignore_errors=True)

    def _numbers(self) -> list[int]:
        if self._mirror:
            return self._mirror.numbers()
        return steps_in(self.folder)

    def _fetch(self, path: Path) -> str:
        """Make sure that a checkpoint is whole and here; what is wrong with it, or nothing."""
        try:
            if self._mirror:
                shutil.rmtree(path, ignore_errors=True)
                self._mirror.fetch(path.name, path)
            read_manifest(path, stage="checkpoint")
        except (ArtifactError, StoreError) as error:
            return error.found
        return ""

    def check_identity(self, *, left_out: str = "") -> None:
        """Refuse those that are there as another run's, but for what ``left_out`` names.

        Raises:
            ConfigError, ArtifactError: as ``find`` does.
        """
        known = self._known_identity()
        now = json.loads(_canonical(self.identity))
        if (written := known.get(_FORMAT_KEY, 1)) != FORMAT:
            raise ArtifactError(
                f"the checkpoints have format {written}; this version reads {FORMAT}",
                where=self._where(),
                fix="go on with the version that wrote them, or set resume=never to begin again",
            )
        differences = [
            f"{key}: {known.get(key)!r} → {now.get(key)!r}"
            for key in sorted({*known, *now})
            if known.get(key) != now.get(key) and key != left_out
        ]
        if not differences or self.resume == "force":
            return
        shown = "\n    ".join(differences[:_SHOWN_DIFFERENCES])
        raise ConfigError(
            f"the checkpoints are those of another run:\n    {shown}",
            where=self._where(),
            fix="choose another output, or set resume=never to remove them and begin again, or "
            "resume=force to go on with them all the same",
        )

    def _known_identity(self) -> dict[str, Any]:
        try:
            if self._mirror:
                text = self._mirror.store.read(IDENTITY).decode()
            else:
                text = (self.folder / IDENTITY).read_text(encoding="utf-8")
            known: dict[str, Any] = dict(json.loads(text))
        except (OSError, ValueError, TypeError, StoreError):
            # cut off or gone: as one of another run, and of no known format
            return {_FORMAT_KEY: "unknown"}
        return known

    def _where(self) -> str:
        return self._mirror.store.root if self._mirror else str(self.folder)


def steps_in(folder: Path) -> list[int]:
    """Numbers of the steps whose checkpoints are in a folder, in order."""
    found = (path.name[5:] for path in folder.glob("step-*"))
    return sorted(int(number) for number in found if number.isdigit())


def _number_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _leave_out_unsaved(states: dict[str, Any], tensors: Path) -> None:
    """Of the optimiser's states by weight, keep those that the checkpoint holds."""
    start = "optimizer.state."
    names = dcp.FileSystemReader(tensors).read_metadata().state_dict_metadata
    saved = {n.removeprefix(start).rpartition(".")[0] for n in names if n.startswith(start)}
    for name in set(states) - saved:
        del states[name]


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, indent=1)
