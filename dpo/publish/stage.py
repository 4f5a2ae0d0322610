"""The publish stage: an approved policy under its content hash, then ``latest.json``.

<name>/<content hash>/...            the model's files, then manifest.json
<name>/latest.json                   written last, names a complete version
runs/<run_id>/...                    report, figures, verdict, settings, provenance
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.errors import ArtifactError
from dpo.publish.finish import tell_of_retry
from dpo.publish.folder import gathered
from dpo.publish.registry import register
from dpo.publish.runs import configured_store, failure_recorded, run_state
from dpo.publish.version import Published, publish_files
from dpo.storage.given_model import read_model
from dpo.storage.manifest import Manifest, read_manifest, record, staged, write_manifest
from dpo.storage.progress import message
from dpo.storage.runs import artifact_records, run_prefix, write_run_manifest


def run_publish(
    config: RunConfig,
    output: Path,
    *,
    policy: Path,
    evaluation: Path,
    verdict: Path,
    run_id: str,
    code: str = "",
) -> Manifest:
    """Publish a policy that the gate approved.

    Args:
        config: Settings; the store is ``publish.store``.
        output: Folder for ``published.json``.
        policy: Checkpoint of the preference stage, or any model that was evaluated.
        evaluation: Output of evaluate, of this policy.
        verdict: Output of gate, on this evaluation.
        run_id: Names the run's folder in the store; empty records nothing there.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        ConfigError: the run's id could name another place.
        ArtifactError: an input is incomplete, refused, or not of the same run.
        StoreError: the store refuses or does not answer.
    """
    if run_id:
        # a wrong id is found before the model is published
        run_prefix(run_id)
    trained, judged, decided = approved_inputs(policy, evaluation, verdict)
    with failure_recorded(config.publish, run_id):
        published = _publish(config, policy, evaluation, trained, run_id)
        with staged(output) as result:
            text = json.dumps(asdict(published), indent=1, sort_keys=True)
            (result / "published.json").write_text(text, encoding="utf-8")
            return write_manifest(
                result,
                "publish",
                settings=stage_settings(config, "publish"),
                inputs={
                    "policy": trained.content_hash,
                    "evaluation": judged.content_hash,
                    "verdict": decided.content_hash,
                },
                code=code,
                details={"files": published.files, "bytes_moved": published.bytes_moved},
            )


def _publish(
    config: RunConfig, policy: Path, evaluation: Path, trained: Manifest, run_id: str
) -> Published:
    """Into the store, into the run's manifest, and into the registry where there is one."""
    store = configured_store(config.publish)
    settings = config.publish
    with gathered(policy, config) as (folder, files):
        published = publish_files(
            store,
            folder,
            files,
            settings.name,
            facts=_facts(run_id, trained),
            deadline_seconds=settings.deadline_seconds,
        )
    if not run_id:
        message("publish", "no run_id is given: the store keeps no record of the run")
    else:
        write_run_manifest(
            store,
            run_id,
            published=asdict(published),
            policy={"content_hash": trained.content_hash, "inputs": trained.inputs},
            artifacts=artifact_records(trained),
        )
    if settings.registry:
        facts = _registry_facts(run_id, trained, evaluation)
        register(settings.registry, published.name, published.content_hash, published.url, facts)
    if run_id:
        write_run_manifest(store, run_id, **run_state("succeeded"))
        tell_of_retry(store, run_id, "publish")
    return published


def _facts(run_id: str, trained: Manifest) -> dict[str, Any]:
    """What the version's manifest says of where it comes from."""
    return {
        "run_id": run_id,
        "policy": trained.content_hash,
        "provenance": record(trained),
        "lineage": trained.lineage,
    }


def _registry_facts(run_id: str, trained: Manifest, evaluation: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"run_id": run_id, "code": trained.code}
    figures = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
    accuracy = (figures.get("after") or {}).get("reward_accuracy") or {}
    for name in ("value", "low", "high"):
        if isinstance(accuracy.get(name), int | float):
            facts[f"reward_accuracy_{name}"] = float(accuracy[name])
    return facts


def approved_inputs(
    policy: Path, evaluation: Path, verdict: Path
) -> tuple[Manifest, Manifest, Manifest]:
    """The manifests of a policy, its evaluation and its verdict.

    Raises:
        ArtifactError: one is incomplete or not of the others' run, or the gate refused the policy.
    """
    # the policy's files are compared with its manifest while they are sent
    trained = read_model(policy, "policy", verify=False)
    judged = read_manifest(evaluation, stage="evaluate")
    decided = read_manifest(verdict, stage="gate")
    if judged.inputs.get("policy") != trained.content_hash:
        problem = "the evaluation is of another policy"
    elif decided.inputs.get("evaluation") != judged.content_hash:
        problem = "the verdict is on another evaluation"
    elif not decided.details.get("approved"):
        problem = "the gate refused this policy"
    else:
        return trained, judged, decided
    raise ArtifactError(
        f"nothing was published: {problem}",
        where=str(verdict),
        fix="pass the outputs of one run; gate.force=true overrides a refusal and is recorded",
    )
