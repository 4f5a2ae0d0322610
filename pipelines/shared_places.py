"""Whether what a run writes on a cluster outlives its pods."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dpo.errors import ConfigError
from pipelines.deployment import CHECKPOINTED_STEPS, CHECKPOINTS_VARIABLE

VARIABLE = "DPO_SHARED_FOLDER"
"""A folder that this machine and every pod have in common, by a cluster that mounts it."""


def check_places(documents: list[dict[str, Any]], store: str) -> None:
    """Refuse a store or a place of checkpoints that is a folder of one pod.

    Args:
        documents: The package, as it will be sent.
        store: Where the run publishes to; may be empty.

    Raises:
        ConfigError: what steps write there would be gone with their pods.
    """
    _refuse_own_folder(store, "publish_store", _mounted(documents, "publish"))
    executors = documents[0]["deploymentSpec"]["executors"]
    for step in CHECKPOINTED_STEPS:
        for variable in executors[f"exec-{step}"]["container"].get("env", []):
            if variable["name"] == CHECKPOINTS_VARIABLE:
                _refuse_own_folder(variable["value"], "checkpoint_uri", _mounted(documents, step))


def _refuse_own_folder(place: str, name: str, shared: Iterable[Path]) -> None:
    folder = _folder(place)
    if folder is None or any(folder.is_relative_to(mount) for mount in shared):
        return
    raise ConfigError(
        f"{place} is a folder of each pod's own: what is written there is gone with the pod",
        where=name,
        fix="name a store that all pods reach, such as s3://bucket/prefix, or a folder below the "
        "deployment's model_cache.mount_path",
    )


def _folder(place: str) -> Path | None:
    if place.startswith("file:"):
        place = unquote(urlsplit(place).path)
    if not place or "://" in place:
        return None
    # no .. leads out of the mounted folder
    return Path(os.path.normpath(place))


def _mounted(documents: list[dict[str, Any]], step: str) -> list[Path]:
    """Folders that a step's pod shares with others."""
    found = [Path(shared)] if (shared := os.environ.get(VARIABLE)) else []
    for document in documents[1:]:
        pods = document["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        mounts = pods.get(f"exec-{step}", {}).get("pvcMount", [])
        found += [Path(mount["mountPath"]) for mount in mounts]
    return found
