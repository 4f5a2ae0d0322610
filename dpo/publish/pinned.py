"""A published version on this machine, for as long as an evaluation measures it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo.publish.verify import pull


@contextmanager
def pinned(url: str | None) -> Iterator[Path | None]:
    """The version at ``url``, fetched and verified into a temporary folder; None for None.

    Raises:
        ArtifactError: nothing complete is published there.
        StoreError: the store does not answer.
    """
    if url is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "published")
        pull(url, target)
        yield target
