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
from contextlib import suppress
from pathlib import Path

from dpo.distributed.together import agree, is_first_of_host


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
                self._lock = os.open(self._alive(self._name), os.O_RDWR | os.O_CREAT, 0o644)
                # shared: each host of the run holds it
                fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
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
        for partial in self.folder.glob(".step-*"):
            if not self._lives(partial.name.split(".")[-2]):
                shutil.rmtree(partial, ignore_errors=True)
        for file in self.folder.glob(".*.alive"):
            if not self._lives(file.name.split(".")[1]):
                file.unlink(missing_ok=True)

    def _alive(self, name: str) -> Path:
        return self.folder / f".{name}.alive"

    def _lives(self, name: str) -> bool:
        """Whether a run holds its lock: not where the file system knows none."""
        try:
            file = os.open(self._alive(name), os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EACCES)
        finally:
            os.close(file)
        return False
