"""Where the checkpoints of a run are: a folder, or a store with a folder in front of it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dpo.errors import ObjectMissing
from dpo.storage.progress import message
from dpo.storage.store import Store, is_store_url, open_store

ROOT_VARIABLE = "DPO_CHECKPOINTS"
"""Environment variable with the folder or store under which steps keep checkpoints."""


@dataclass(frozen=True)
class Place:
    """A folder for the checkpoints of one run, and the store that they go on to, if one was set."""

    folder: Path
    store: Store | None = None


def place_of(name: str, identity: Mapping[str, Any], uri: str | None = None) -> Place | None:
    """The place of a run: one for each identity, so the same run finds its checkpoints again.

    Args:
        name: Of the stage.
        identity: What decides its result.
        uri: Folder or store to keep them in; None takes that of ``DPO_CHECKPOINTS``, if it is set.

    Raises:
        ConfigError: not a store's URL.
        StoreError: ``uri`` names a store that does not answer, refuses, or has no such bucket.
    """
    root = uri or os.environ.get(ROOT_VARIABLE)
    if not root:
        return None
    text = json.dumps(identity, sort_keys=True)
    own = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if not is_store_url(root):
        return Place(Path(root).expanduser() / own)
    if root.startswith("file://"):
        return Place(Path(unquote(urlsplit(root).path)) / own)
    store = open_store(f"{root.rstrip('/')}/{own}")
    try:
        store.check()
    except ObjectMissing as error:
        if uri:
            raise
        # set for every run of a deployment, whose last step may be the one that makes the bucket
        message(name, f"no checkpoints are kept: {error.found}")
        return None
    return Place(Path(tempfile.gettempdir()) / f"dpo-{os.getuid()}" / own, store)
