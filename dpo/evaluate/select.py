"""The best candidate of a sweep, by the validation part of the held-out pairs.

The best goes through the gate on the test part, which this selection never saw; so what the gate
decides on is not the largest of several noisy figures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError
from dpo.evaluate.ranking import ranks
from dpo.storage.manifest import Manifest, read_manifest, staged
from dpo.storage.progress import message


@dataclass(frozen=True)
class Candidate:
    """One trained policy of a sweep."""

    overrides: str
    """JSON list of the settings that it was trained with."""
    policy: Path
    accuracy: float
    """Reward accuracy on the validation part."""
    loss: float
    """Preference loss on the validation part."""
    evaluation: Mapping[str, Any]
    """All of its figures."""


def run_select(
    overrides: Sequence[str], policies: Sequence[Path], evaluations: Sequence[Path], output: Path
) -> tuple[Candidate, str, Manifest]:
    """Copy the best policy to ``output``.

    Args:
        overrides: Of each candidate, in the order of the other two.
        policies: Outputs of preference.
        evaluations: Outputs of evaluate on the validation part.
        output: Folder to make; a copy with the same content hash.

    Returns:
        The best candidate, a table of all as Markdown, and the manifest of the policy.

    Raises:
        ArtifactError: an evaluation is not of the policy beside it, or not on the validation part.
    """
    candidates = [_read(*given) for given in zip(overrides, policies, evaluations, strict=True)]
    places = ranks([candidate.evaluation for candidate in candidates])
    best = candidates[places.index(max(places))]
    message("select", f"best of {len(candidates)} on the validation part: {best.overrides}")
    with staged(output) as folder:
        shutil.copytree(best.policy, folder, dirs_exist_ok=True)
    return best, _table(candidates, best), read_manifest(output, stage="preference")


def _read(overrides: str, policy: Path, evaluation: Path) -> Candidate:
    trained = read_manifest(policy, stage="preference", verify=False)
    judged = read_manifest(evaluation, stage="evaluate", verify=False)
    if judged.inputs.get("policy") != trained.content_hash:
        raise ArtifactError("the evaluation is of another policy", where=str(evaluation))
    part = judged.settings.get("evaluation", {}).get("part")
    if part != "validation":
        raise ArtifactError(
            f"a sweep selects on the validation part, this evaluation measured {part}",
            where=str(evaluation),
        )
    found: dict[str, Any] = json.loads((evaluation / "evaluation.json").read_text("utf-8"))
    accuracy, loss = (found["after"][name]["value"] for name in ("reward_accuracy", "loss"))
    return Candidate(overrides, policy, accuracy, loss, found)


def _table(candidates: Sequence[Candidate], best: Candidate) -> str:
    lines = [
        "# Sweep",
        "",
        "Selected on the validation part of the held-out pairs; the gate decides on the test part. "
        "Equal accuracies are decided by the preference loss, of different losses by the area "
        "under the ROC curve of the rewards.",
        "",
        "| candidate | reward accuracy | preference loss | |",
        "|---|---|---|---|",
    ]
    for candidate in candidates:
        mark = "selected" if candidate is best else ""
        name = ", ".join(json.loads(candidate.overrides))
        lines.append(f"| {name} | {candidate.accuracy:.3f} | {candidate.loss:.3f} | {mark} |")
    return "\n".join([*lines, ""])
