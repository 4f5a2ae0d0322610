"""Whether what a run reads on a cluster is seen by its pods, and what it writes outlives them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dpo.config.overrides import unquoted
from dpo.config.parameters import OVERRIDES, STARTS, stage_configs
from dpo.config.schema import is_template_file
from dpo.errors import ConfigError
from dpo.storage.base_model import is_written_as_path
from pipelines.deployment import CHECKPOINTED_STEPS, CHECKPOINTS_VARIABLE

VARIABLE = "DPO_SHARED_FOLDER"
"""A folder that this machine and every pod have in common, in a volume or in the image."""

_OF_STORES = ("datasets", *STARTS)
_IN_STORE = "put it into a store and name its URL (s3://bucket/path)"
_IN_IMAGE = "put it into the image"


def check_places(documents: list[dict[str, Any]], values: Mapping[str, Any]) -> None:
    """Refuse a store or a place of checkpoints that is a folder of one pod.

    Args:
        documents: The package, as it will be sent.
        values: Parameters of the run.

    Raises:
        ConfigError: what steps write there would be gone with their pods.
    """
    _refuse_own_folder(
        str(values["publish_store"]), "publish_store", _mounted(documents, "publish")
    )
    executors = documents[0]["deploymentSpec"]["executors"]
    for step in CHECKPOINTED_STEPS:
        for variable in executors[f"exec-{step}"]["container"].get("env", []):
            if variable["name"] == CHECKPOINTS_VARIABLE:
                _refuse_own_folder(variable["value"], "checkpoint_uri", _mounted(documents, step))


def check_inputs(documents: list[dict[str, Any]], values: Mapping[str, Any]) -> None:
    """Refuse inputs that lie on this machine, which is none of the cluster's.

    Args:
        documents: The package, as it will be sent.
        values: Parameters of the run.

    Raises:
        ConfigError: nothing says that the pods see what is here.
    """
    # the volume of a deployment is mounted in every step
    shared = _mounted(documents, "fingerprint")
    for name, place in inputs(values):
        _refuse_file_of_this_machine(place, name, shared)


def inputs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the steps read from outside, by the parameter that names it."""
    configs = stage_configs(values)
    for source in configs["ingest"].sources.values():
        yield "datasets", source.path or ""
    model = configs["sft"].model
    for name in filter(None, (model.name_or_path, model.tokenizer_name_or_path)):
        # others are hub ids to a pod, whatever folders are here
        yield "model", name if is_written_as_path(name) else ""
    yield "model", model.archive or ""
    for name in STARTS:
        yield name, str(values.get(name) or "")
    for name in OVERRIDES:
        for word in values.get(name, []):
            key, _, value = str(word).partition("=")
            # the settings above have the file's text already
            if key == "chat_template" and is_template_file(file := unquoted(value)):
                yield key, file


def _refuse_file_of_this_machine(place: str, name: str, shared: Iterable[Path]) -> None:
    """One that is not here either may be in the image: the run's first step tells."""
    if (found := local_place(place)) is None or not _is_here(found, shared):
        return
    raise ConfigError(
        f"{place} lies on this machine, and nothing says that the run's pods see it",
        where=name,
        fix=f"{_IN_STORE if name in _OF_STORES else _IN_IMAGE}, or into a folder below the "
        f"deployment's model_cache.mount_path; if pods have it at the same path: {VARIABLE}=FOLDER",
    )


def _is_here(found: Path, shared: Iterable[Path]) -> bool:
    """Whether it exists outside the shared folders."""
    try:
        path = Path(os.path.normpath(Path.cwd() / found.expanduser()))
        if any(path.is_relative_to(mount) for mount in shared):
            return False
        # Path.glob takes no absolute pattern
        return path.exists() or bool(glob(str(path), recursive=True))  # noqa: PTH207
    except (OSError, RuntimeError, ValueError):
        # ~ of nobody, or a text that can be no file's name
        return False


def _refuse_own_folder(place: str, name: str, shared: Iterable[Path]) -> None:
    folder = local_place(place)
    if folder is None or any(folder.is_relative_to(mount) for mount in shared):
        return
    raise ConfigError(
        f"{place} is a folder of each pod's own: what is written there is gone with the pod",
        where=name,
        fix="name a store that all pods reach, such as s3://bucket/prefix, or a folder below the "
        "deployment's model_cache.mount_path",
    )


def local_place(place: str) -> Path | None:
    """The path of a place on this machine; None where it is the URL of another or nothing."""
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
