"""Unfinished checkpoints, and whether the run that began them still lives.

<place>/.step-N.<attempt>.partial    what a run is writing
<place>/.<attempt>.alive             locked by that run until it ends, however it ends
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from dpo.distributed.together import agree, is_first_of_host

_HELD = (errno.EAGAIN, errno.EACCES)
_TRIES, _PAUSE_SECONDS = 100, 0.02
"""Others hold a lock for as long as it takes to look, or to remove one file."""


class Attempt:
    """One run that writes into a folder; others see that it lives from its first checkpoint on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._name = agree(secrets.token_hex(4))
        self._lock = -1

    def begin(self, number: int) -> Path:
        """The folder in which the checkpoint of that number is to be made."""
        if self._lock < 0 and is_first_of_host():
            # on a full disk, or where no locks are known, it goes on without
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = _hold(self._alive(self._name))
        return self.folder / f".step-{number}.{self._name}.partial"

    def end(self) -> None:
        """Nothing more is written."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            with suppress(OSError):
                self._alive(self._name).unlink()

    def tidy(self) -> None:
        """Remove what was begun by runs that have ended."""
        for file in self.folder.glob(".*.alive"):
            self._lives(file.name.split(".")[1], remove=True)
        # a run holds its lock before it begins one of these
        for partial in self.folder.glob(".step-*"):
            if not self._lives(partial.name.split(".")[-2]):
                shutil.rmtree(partial, ignore_errors=True)

    def _alive(self, name: str) -> Path:
        return self.folder / f".{name}.alive"

    def _lives(self, name: str, *, remove: bool = False) -> bool:
        """Whether a run holds its lock: not where the file system knows none.

        With ``remove`` the file goes if it does not, while nobody else can take its lock.
        """
        path = self._alive(name)
        try:
            file = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            held = not _taken(file, fcntl.LOCK_EX)
            if remove and not held:
                path.unlink(missing_ok=True)
        finally:
            os.close(file)
        return held


def _hold(path: Path) -> int:
    """Make the file and take its lock; returns what keeps both.

    A run that tidies between the two takes the file for one of a run that has ended.

    Raises:
        OSError: it could not be made, or others held it each time.
    """
    for _ in range(_TRIES):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # shared: each host of the run holds it
        if _taken(file, fcntl.LOCK_SH) and _is_at(file, path):
            return file
        os.close(file)
        time.sleep(_PAUSE_SECONDS)
    raise TimeoutError(errno.ETIMEDOUT, "others held it each time", str(path))


def _taken(file: int, how: int) -> bool:
    """Whether nobody else has the lock; where no locks are known, nobody has."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
