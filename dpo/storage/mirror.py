"""Folders with a manifest, kept in a store: written so that a reader sees whole ones only.

<store>/<name>/...            files
<store>/<name>/manifest.json  last: what has none is not there
"""

from __future__ import annotations

import re
from pathlib import Path

from dpo.storage.manifest import MANIFEST, sha256_file
from dpo.storage.store import Store

_STEP = re.compile(r"step-(\d+)/")


class Mirror:
    """Numbered folders (``step-N``) of one run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def numbers(self) -> list[int]:
        """Numbers of the complete ones, ascending."""
        names = re.compile(rf"step-(\d+)/{re.escape(MANIFEST)}")
        found = (names.fullmatch(key) for key in self.store.list("step-"))
        return sorted(int(match[1]) for match in found if match)

    def send(self, folder: Path, name: str) -> None:
        """Upload every file of ``folder`` but its manifest.

        Raises:
            StoreError: the store refuses or does not answer.
        """
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path != folder / MANIFEST:
                key = f"{name}/{path.relative_to(folder).as_posix()}"
                self.store.upload(path, key, sha256_file(path))

    def complete(self, folder: Path, name: str) -> None:
        """Upload the manifest: the folder is whole now."""
        path = folder / MANIFEST
        self.store.upload(path, f"{name}/{MANIFEST}", sha256_file(path))

    def fetch(self, name: str, folder: Path) -> None:
        """Download a folder whole.

        Raises:
            StoreError: the store refuses or does not answer.
        """
        for key in self.store.list(f"{name}/"):
            path = folder / key.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.store.download(key, path)

    def remove(self, name: str) -> None:
        """Remove a folder, its manifest first."""
        self.store.delete(f"{name}/{MANIFEST}")
        for key in list(self.store.list(f"{name}/")):
            self.store.delete(key)

    def keep_newest(self, n: int, newest: int) -> None:
        """Remove all but the ``n`` newest complete folders, and what was begun before the newest.

        The parts of a folder that was never completed are as large as a folder.

        Args:
            n: How many to keep.
            newest: Number of the one that was completed last. What has a higher one stays: it could
                not be used, or is another run's.
        """
        kept = [number for number in self.numbers() if number <= newest][-n:]
        begun = {int(match[1]) for key in self.store.list("step-") if (match := _STEP.match(key))}
        # nothing is removed where another run has removed them meanwhile
        newest = max(kept, default=0)
        for number in sorted(begun):
            if number < newest and number not in kept:
                self.remove(f"step-{number}")

    def clear(self) -> None:
        """Remove everything."""
        for number in self.numbers():
            self.remove(f"step-{number}")
        for key in list(self.store.list()):
            self.store.delete(key)
