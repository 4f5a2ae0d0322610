"""``--from RUN_ID``: an earlier run's parameters and artifacts as the beginning of a new one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo.config.parameters import STARTS
from dpo.errors import PipelineError, RequestError
from dpo.storage.runs import read_run_manifest
from pipelines import cluster
from pipelines.history import INPUTS


def earlier_run(options: argparse.Namespace, runs: Path) -> dict[str, Any]:
    """``parameters`` and ``sources`` (URI of each step's output) of the run to start from.

    Raises:
        RequestError: neither this machine nor the store knows the run, or it left no artifacts.
    """
    run_id = options.start_from
    record = runs / "history" / run_id / "run.json"
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        found = {"parameters": known["parameters"], "sources": known["artifacts"]}
    elif options.local and not options.store:
        raise RequestError(
            f"there is no local run {run_id}",
            where=str(record.parent.parent),
            fix="name a folder of it, or pass the --store of a run on Kubeflow",
        )
    else:
        found = known_run(options.store or _store_of(options), run_id)
    if not found.get("sources"):
        raise RequestError(
            f"run {run_id} left no artifacts to start from: it did not come to its gate",
            fix="run it again as it was: finished steps come from the cache",
        )
    return found


def known_run(store: str, run_id: str) -> dict[str, Any]:
    """The manifest of a run that somebody asked for.

    Raises:
        RequestError: the store has none of that run.
        StoreError: the store does not answer.
    """
    try:
        return read_run_manifest(store, run_id)
    except PipelineError as missing:
        raise RequestError(missing.found, where=missing.where, fix=missing.fix) from None


def _store_of(options: argparse.Namespace) -> str:
    target = cluster.endpoint(options.endpoint, options.namespace)
    run = cluster.get_run(cluster.connect(target), target, options.start_from)
    url = str(cluster.parameters_of(run).get("publish_store") or "")
    if not url:
        raise RequestError(
            f"run {options.start_from} names no store", fix="pass the store's URL with --store"
        )
    return url


def base(
    earlier: Mapping[str, Any], defaults: Mapping[str, Any], rerun: Iterable[str]
) -> dict[str, Any]:
    """Parameters to begin with: the earlier run's, and its artifacts where they still hold.

    Args:
        earlier: From ``earlier_run``; empty changes nothing.
        defaults: The parameters that this version of the pipeline has.
        rerun: Steps to run again; what follows them runs as well.
    """
    if not earlier:
        return {}
    values = {n: v for n, v in (earlier.get("parameters") or {}).items() if n in defaults}
    again = set(rerun)
    for step, inputs in INPUTS.items():
        if again & set(inputs):
            again.add(step)
    sources = earlier["sources"]
    for name, step in STARTS.items():
        values[name] = "" if step in again else str(sources.get(step, ""))
    return values
