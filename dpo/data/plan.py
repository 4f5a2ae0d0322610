"""What a pipeline run will do: each step's settings, and fingerprints of all that it reads.

The first step of the pipeline calls ``plan_run``. What it returns are the arguments of the other
steps, so Kubeflow's cache sees each change of data, base model, settings or code, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from dpo.config.parameters import STARTS, stage_configs
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, stage_json
from dpo.data.given import check_fits
from dpo.data.rules import tokenizer_fingerprint
from dpo.data.sources import data_fingerprint, source_fingerprints
from dpo.errors import ConfigError
from dpo.storage.adopt import read_artifact
from dpo.storage.base_model import model_fingerprint
from dpo.storage.fingerprint import code_fingerprint, source_fingerprint
from dpo.storage.folder import FolderStore
from dpo.storage.store import Store, open_store

_CACHED: tuple[Stage, ...] = ("ingest", "sft", "reference", "preference", "evaluate")
_NEVER_CACHED: tuple[Stage, ...] = ("gate", "publish")


_POD_VARIABLE = "KFP_POD_NAME"
"""Kubeflow sets it in the pods of steps."""
EXPECTED_SOURCE = "DPO_EXPECTED_SOURCE"
"""Set on the first step when a package is made for a cluster: ``source_fingerprint`` there."""


def check_source() -> None:
    """Refuse to run in an image that holds other code than the package was compiled from.

    Raises:
        ConfigError: with both fingerprints.
    """
    expected = os.environ.get(EXPECTED_SOURCE)
    if expected and expected != (found := source_fingerprint()):
        raise ConfigError(
            "the image was built from other code than the pipeline that runs in it: "
            f"source {found[:12]}, the pipeline expects {expected[:12]}",
            fix="build images and pipeline from one commit: `make images-push`, `make pipeline`",
        )


def plan_run(
    parameters: Mapping[str, Any], *, store_needed: bool = False, key_only: bool | None = None
) -> dict[str, str]:
    """Settings and fingerprints by output name (``sft_settings``, ``sft_fingerprint``, ...).

    Everything that can be known to be wrong before training is found here: a setting, a source or a
    base model that is missing, an artifact to start from that is none, a store that does not
    answer.

    Args:
        parameters: Values of the pipeline's parameters.
        store_needed: Whether a run without a store is a mistake.
        key_only: Leave out settings that change no result (``stage_json``).

    Raises:
        DpoError: what is wrong.
    """
    configs = stage_configs(parameters)
    publish = configs["publish"].publish
    if publish.store:
        store = open_store(publish.store)
        _check_outlives_pod(store)
        store.check(create=publish.create_bucket)
    elif store_needed:
        raise ConfigError(
            "there is no store to publish to",
            where="publish_store",
            fix="set it to s3://bucket/prefix, minio://bucket/prefix or file:///folder",
        )
    sources = _sources(configs, parameters)
    plan = {
        f"{stage}_settings": stage_json(configs[stage], stage, key_only=key_only)
        for stage in (*_CACHED, *_NEVER_CACHED)
    }
    for stage in _CACHED:
        known = {"code": code_fingerprint(stage), **sources.get(stage, {})}
        plan[f"{stage}_fingerprint"] = json.dumps(known, sort_keys=True)
    return plan


def _check_outlives_pod(store: Store) -> None:
    """Refuse a store in the file system of a pod: the form takes any text, and the model that was
    published there would be gone with the pod. A volume that is mounted may be kept.

    Raises:
        ConfigError: it is such a folder.
    """
    if not isinstance(store, FolderStore) or not os.environ.get(_POD_VARIABLE):
        return
    if not any(map(os.path.ismount, (store.folder, *store.folder.parents[:-1]))):
        raise ConfigError(
            f"{store.root} is a folder of this pod, and what is published there would be gone with "
            "it",
            where="publish_store",
            fix="name a bucket: s3://bucket/prefix or minio://bucket/prefix",
        )


def _sources(
    configs: Mapping[Stage, RunConfig], parameters: Mapping[str, Any]
) -> dict[Stage, dict[str, str]]:
    """What each step reads from outside the run: data, base model, or an artifact in its place."""
    sources: dict[Stage, dict[str, str]] = {}
    for name, stage in STARTS.items():
        if uri := str(parameters.get(name) or ""):
            manifest = read_artifact(uri, stage)
            check_fits(name, uri, manifest, configs, parameters)
            sources[stage] = {"artifact": manifest.content_hash}
    if "ingest" not in sources:
        data = data_fingerprint(source_fingerprints(configs["ingest"]))
        # texts are checked against the tokenizer, which may also bring the chat template
        tokenizer = tokenizer_fingerprint(configs["ingest"])
        sources["ingest"] = {"data": data, "tokenizer": tokenizer}
    if "sft" not in sources:
        sources["sft"] = {"model": model_fingerprint(configs["sft"].model)}
    return sources
