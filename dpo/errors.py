"""The errors that this project raises on purpose.

    DpoError
    ├── ConfigError              a key, a value or a combination that cannot work
    ├── DataError                preference data that is missing, unreadable or wrong
    ├── ArtifactError            a step's output that is missing, incomplete or changed
    │   └── OutputGone           nothing is left of it, or it never was there
    ├── ModelError               a model, tokenizer or archive that does not load or fit
    ├── TrainingError            training that cannot go on
    │   ├── InvariantError       policy and reference differ where they must agree (step 0)
    │   ├── NonFiniteError       NaN or infinity in a loss or a gradient
    │   └── TrainingStopped      a polite request to end; a checkpoint was written
    ├── EvaluationError          a judge that gives no verdict, runs that cannot be compared
    ├── StoreError               a store that refuses or does not answer
    │   ├── StoreUnavailable     no answer, or the connection broke and retries ran out
    │   ├── StoreFull            no space is left where the store keeps its objects
    │   ├── StoreAccessDenied    wrong or missing credentials, or no permission
    │   ├── ObjectMissing        no such object or bucket
    │   └── WriteConflict        a conditional write lost against another writer
    ├── PipelineError            a run that failed, or a backend that refuses it
    │   └── RequestError         what was asked for is not there (run, endpoint, store)
    └── MissingDependency        an optional package that this command needs is not installed

Each message says what was found, where, and what to do. A command prints that message alone, with
no traceback, and exits with ``exit_code``: 2 for a mistake in the command or its configuration,
1 for everything else; 75 (try again) for a training that was asked to stop.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

_PASSWORD = re.compile(r"(://)[^/?#\s'\"\[]*@")
# a password that should have been percent-encoded; a port and a path are none
_UGLY_PASSWORD = re.compile(r"(://[^/?#\s@:'\"]+:)(?!\d+[/?#])[^\s'\"]*@")
_KEY_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:token|key|secret|signature|password|credential|sig)[^=&\s]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a write is refused with; a network that breaks is an ``OSError`` too."""
_IN_RUST = re.compile(r"\(os error (\d+)\)")
_UNPRINTED = re.compile(
    # C0 and C1 but newline and tab, marks of direction, separators that some take for a line's end,
    # and halves of characters, which no encoding can write
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"
    r"\ud800-\udfff]"
)


def masked(text: str) -> str:
    """``text`` with ``***`` for user and password in URLs, and for keys in their queries."""
    if "://" not in text:
        return text
    text = _UGLY_PASSWORD.sub(r"://***@", _PASSWORD.sub(r"\1***@", text))
    return _KEY_IN_QUERY.sub(r"\1***", text)


def holds_password(text: str) -> bool:
    """Whether ``text`` is a URL with a user or a password in it."""
    return bool(_PASSWORD.search(text) or _UGLY_PASSWORD.search(text))


def printable(text: str) -> str:
    """``text`` with control characters and marks of direction as escapes, so that it stays text.

    Newlines and tabs are left. A terminal would obey the others, or show another text. Halves of
    characters are escaped too: they cannot be written.
    """
    return _UNPRINTED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_any_text() -> None:
    """Let standard output take texts that its encoding lacks, as escapes; call it once, at first.

    Where a terminal or a pipe is not UTF-8, ``print`` raises at the first ``–`` or umlaut: a run
    of an hour would end in a traceback over its summary. Standard error does so by itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class DpoError(Exception):
    """What was found, where, and what to do about it; without passwords and terminal escapes.

    Args:
        found: What was found, one sentence.
        where: File and line, key, row, URL: the place to look at.
        fix: What the reader can do, an imperative sentence.
    """

    exit_code = 1

    def __init__(self, found: str, *, where: str | None = None, fix: str | None = None) -> None:
        # texts of users, of stores and of models reach terminals, logs and manifests this way
        self.found = printable(masked(found))
        self.where = printable(masked(where)) if where is not None else None
        self.fix = printable(masked(fix)) if fix is not None else None
        super().__init__(self.found, self.where, self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        # processes that train together send each other their problems
        return partial(type(self), where=self.where, fix=self.fix), (self.found,)

    def __str__(self) -> str:
        lines = [self.found]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            # further lines of commands stand below the first
            lines.append("  fix:   " + self.fix.replace("\n  ", "\n         "))
        return "\n".join(lines)


class ConfigError(DpoError):
    """A key, a value or a combination that cannot work; found before anything heavy is loaded."""

    exit_code = 2


class DataError(DpoError):
    """Preference data that is missing, unreadable or not what it should be."""


class ArtifactError(DpoError):
    """A step's output that is missing, incomplete, or changed since it was written."""


class OutputGone(ArtifactError):
    """An output of which nothing is there."""


class ModelError(DpoError):
    """A model, tokenizer or archive that cannot be loaded or does not fit the others."""


class TrainingError(DpoError):
    """Training that cannot go on."""


class InvariantError(TrainingError):
    """Policy and reference differ where they must agree: before the first update."""


class NonFiniteError(TrainingError):
    """NaN or infinity in a loss or a gradient."""


class TrainingStopped(TrainingError):
    """SIGTERM: a checkpoint was written, the same command goes on from there."""

    exit_code = 75


def stopped_outside_of_steps() -> TrainingStopped:
    """Training that was asked to stop while it loads, scores or writes."""
    return TrainingStopped(
        "it was asked to stop outside of its steps; no checkpoint was written",
        fix="run the same command again: it goes on from its last checkpoint, if it has one",
    )


class EvaluationError(DpoError):
    """A judge that gives no verdict, or runs that cannot be compared."""


class StoreError(DpoError):
    """A store that refuses or does not answer."""


class StoreUnavailable(StoreError):
    """The store gave no answer, or the connection broke and the retries ran out."""


class StoreFull(StoreError):
    """No space is left where the store keeps its objects; trying again does not help."""


class StoreAccessDenied(StoreError):
    """Wrong or missing credentials, or no permission for this object."""


class ObjectMissing(StoreError):
    """No such object or bucket."""


class WriteConflict(StoreError):
    """A conditional write lost against another writer."""


class PipelineError(DpoError):
    """A run that failed, or a backend that refuses it."""


class RequestError(PipelineError):
    """What was asked for is not there (a run, an endpoint, a store); nothing was started."""

    exit_code = 2


class MissingDependency(DpoError):
    """An optional package that this command needs is not installed."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name ``folder`` in the errors of what is written there: the system names no file then.

    Libraries in Rust (safetensors, tokenizers) report such an error in words of their own; torch
    fails once more, over the file that it could not write.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _OF_WRITING:
            error.filename = str(folder)
        raise
    except DpoError:
        raise
    except Exception as error:
        number = _hidden_number(error)
        if number not in _OF_WRITING:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from None


def _hidden_number(error: Exception) -> int:
    """The system's number for what a library reports in words of its own; 0 where there is none."""
    if found := _IN_RUST.search(str(error)):
        return int(found[1])
    before = error.__context__
    return (before.errno or 0) if isinstance(before, OSError) else 0


def system_problem(error: OSError) -> DpoError:
    """What the operating system refused (a full disk, a missing permission) as our message."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DpoError(
        "the disk is full" if full else error.strerror or str(error),
        where=str(error.filename) if error.filename else None,
        fix="free space, then run again" if full else "repair it, then run again",
    )
