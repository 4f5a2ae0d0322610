"""What a run leaves in the store beside the model: its verdict, figures, report and provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo.config.schema import PublishConfig
from dpo.errors import ConfigError, DpoError, masked, printable
from dpo.publish.finish import tell_of_retry
from dpo.publish.version import require_conditions
from dpo.storage.lineage import read_sources
from dpo.storage.manifest import read_manifest, sha256_file
from dpo.storage.runs import (
    MANIFEST_NAME,
    artifact_records,
    policy_of_run,
    run_prefix,
    stored_run_manifest,
    write_run_manifest,
)
from dpo.storage.store import Store, open_store

IMAGES_VARIABLE = "DPO_IMAGES"
"""Set on the first step when a package is made for a cluster: JSON of the images' names."""
CANDIDATES_VARIABLE = "DPO_CANDIDATES"
"""Set likewise where the package has a sweep: JSON list of what each candidate changes."""
_EVALUATION_FILES = ("report.html", "report.md", "evaluation.json", "samples.json", "pairs.json")


def configured_store(publish: PublishConfig) -> Store:
    """The store that settings name, checked to answer, with the patience that they ask for.

    Raises:
        ConfigError: none is named.
        StoreError: it does not answer, or its bucket is missing.
    """
    if not publish.store:
        raise ConfigError(
            "there is no store to publish to",
            where="publish.store",
            fix="set it to s3://bucket/prefix, minio://bucket/prefix or file:///folder",
        )
    store = open_store(publish.store)
    # a store that is not there from the start is a wrong address; one that goes away comes back
    store.check(create=publish.create_bucket)
    store.retry_seconds = publish.retry_seconds
    return store


def record_plan(parameters: Mapping[str, Any], run_id: str, plan: Mapping[str, str]) -> None:
    """Begin the run's manifest: what it was asked for, and each step's settings and fingerprints.

    Raises:
        StoreError: the store refuses, does not answer, or is none that a model can be published
            to: better told now than after the training.
    """
    candidates = json.loads(os.environ.get(CANDIDATES_VARIABLE) or "[]")
    store = open_store(str(parameters["publish_store"]))
    write_run_manifest(
        store,
        run_id,
        state="running",
        began=datetime.now(UTC).isoformat(timespec="seconds"),
        parameters=dict(parameters),
        plan=dict(plan),
        **({"candidates": candidates} if candidates else {}),
        images=json.loads(os.environ.get(IMAGES_VARIABLE) or "{}"),
    )
    key = f"{run_prefix(run_id)}/{MANIFEST_NAME}"
    require_conditions(store, key, store.read(key))


def run_state(state: str, reason: str | None = None) -> dict[str, Any]:
    """The state of a run now, without what ``finish`` wrote of an earlier attempt."""
    ended = datetime.now(UTC).isoformat(timespec="seconds") if state != "running" else None
    return {"state": state, "ended": ended, "backend_state": None, "reason": reason}


@contextmanager
def failure_recorded(publish: PublishConfig, run_id: str) -> Iterator[None]:
    """A failure is written into the run's manifest: Kubeflow runs no ``finish`` after a retry."""
    try:
        yield
    except Exception as error:
        # the store may be what failed: it is asked anew, with less patience
        with suppress(DpoError):
            if run_id and publish.store:
                reason = printable(masked(str(error)))
                write_run_manifest(open_store(publish.store), run_id, **run_state("failed", reason))
        raise


def refuse_other_policy(publish: PublishConfig, run_id: str, policy: str) -> None:
    """Make sure that what is recorded under ``run_id`` will not be overwritten by another's.

    The gate measures improvement by the record of the run that published a version.

    Args:
        publish: Settings.
        run_id: Of the run that is to be recorded.
        policy: Content hash of its policy.

    Raises:
        ConfigError: a run of another policy has this id.
        StoreError: the store refuses or does not answer.
    """
    store = configured_store(publish)
    known = policy_of_run(stored_run_manifest(store, run_id))
    if known not in (policy, ""):
        raise ConfigError(
            f"run {run_id} in the store is of another policy, {known[:12]}; this one is "
            f"{policy[:12]}",
            where=store.url(run_prefix(run_id)),
            fix="choose a name for this run: exp_name=NAME",
        )


def record_verdict(publish: PublishConfig, run_id: str, *, evaluation: Path, verdict: Path) -> None:
    """Store the report, the figures and the verdict of a run, whether it is approved or not.

    The run's state is written as well: Kubeflow does not run ``finish`` again for a failed run that
    is retried, and the manifest would go on to say that it failed.
    """
    store = configured_store(publish)
    judged = read_manifest(evaluation, stage="evaluate")
    decided = read_manifest(verdict, stage="gate")
    # the gate's copy of the report has the verdict on top
    own = {path.name for path in verdict.iterdir()}
    files = [(verdict if name in own else evaluation) / name for name in _EVALUATION_FILES]
    files = [path for path in files if path.is_file()]
    for path in (*files, verdict / "verdict.json"):
        store.upload(path, f"{run_prefix(run_id)}/{path.name}", sha256_file(path))
    configuration = {
        entry["step"]: entry["configuration"]
        for entry in artifact_records(judged, decided).values()
    }
    text = json.dumps(configuration, indent=1, sort_keys=True).encode()
    store.write(f"{run_prefix(run_id)}/configuration.json", text)
    decision = json.loads((verdict / "verdict.json").read_text(encoding="utf-8"))
    write_run_manifest(
        store,
        run_id,
        **run_state("running" if decision["approved"] else "refused"),
        verdict=decision,
        evaluation=json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8")),
        artifacts=artifact_records(judged, decided),
        settings={"evaluate": judged.settings, "gate": decided.settings},
        sources=read_sources(evaluation),
    )
    if not decision["approved"]:
        tell_of_retry(store, run_id, "gate")
