"""``runs/<run_id>/manifest.json`` in the store: what a run decided and published.

Kubeflow's run API does not return task outputs (kubeflow/pipelines#9858), so whoever waits for a
run reads its verdict here.
"""

from __future__ import annotations

import json
import re
from typing import Any

from dpo.errors import ConfigError, ObjectMissing, PipelineError
from dpo.storage.store import Store, open_store

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def run_prefix(run_id: str) -> str:
    """Folder of a run in the store.

    Raises:
        ConfigError: the id could name another place.
    """
    if not _RUN_ID.fullmatch(run_id):
        raise ConfigError(
            f"{run_id!r} is not a run id", fix="use letters, digits, dot, dash and underscore"
        )
    return f"runs/{run_id}"


def write_run_manifest(store: Store, run_id: str, **values: Any) -> None:
    """Add ``values`` to the run's manifest."""
    key = f"{run_prefix(run_id)}/{MANIFEST_NAME}"
    merged = {
        **stored_run_manifest(store, run_id),
        **values,
        "run_id": run_id,
        "format_version": FORMAT_VERSION,
    }
    store.write(key, json.dumps(merged, indent=1, sort_keys=True).encode())


def stored_run_manifest(store: Store, run_id: str) -> dict[str, Any]:
    """What the run's manifest holds so far; empty where there is none."""
    key = f"{run_prefix(run_id)}/{MANIFEST_NAME}"
    known: dict[str, Any] = json.loads(store.read(key)) if store.stat(key) else {}
    return known


def read_run_manifest(url: str, run_id: str) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        PipelineError: the run left none: it did not reach the gate.
        StoreError: the store does not answer.
    """
    store = open_store(url)
    try:
        values: dict[str, Any] = json.loads(store.read(f"{run_prefix(run_id)}/manifest.json"))
    except ObjectMissing:
        raise PipelineError(
            f"run {run_id} left no manifest in the store",
            where=url,
            fix="look at the run in the UI: it ended before its gate",
        ) from None
    return values
