"""The gate: whether the held-out figures are good enough to publish. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.errors import ArtifactError
from dpo.storage.manifest import read_manifest, staged, write_manifest


@dataclass(frozen=True)
class Rule:
    """One rule with its figure and limit."""

    name: str
    value: float
    limit: float
    passed: bool
    explanation: str


@dataclass(frozen=True)
class Verdict:
    """The decision on a policy."""

    approved: bool
    forced: bool
    """Approved although a rule failed, because ``gate.force`` is set."""
    rules: tuple[Rule, ...]
    evaluation: str
    """Content hash of the evaluation that was judged."""


def run_gate(config: RunConfig, output: Path, *, evaluation: Path, code: str = "") -> Verdict:
    """Apply the rules to an evaluation and write ``verdict.json`` into the folder ``output``.

    A refusal is a result: it raises nothing.

    Raises:
        ArtifactError: the evaluation is incomplete or changed.
    """
    judged = read_manifest(evaluation, stage="evaluate")
    try:
        figures = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        rules = (_reward_accuracy(config, figures),)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactError(
            f"the evaluation cannot be read: {error!r}",
            where=str(evaluation / "evaluation.json"),
            fix="run the step evaluate again",
        ) from None
    passed = all(rule.passed for rule in rules)
    verdict = Verdict(
        approved=passed or config.gate.force,
        forced=config.gate.force and not passed,
        rules=rules,
        evaluation=judged.content_hash,
    )
    with staged(output) as folder:
        text = json.dumps(asdict(verdict), indent=1, sort_keys=True)
        (folder / "verdict.json").write_text(text, encoding="utf-8")
        write_manifest(
            folder,
            "gate",
            settings=stage_settings(config, "gate"),
            inputs={"evaluation": judged.content_hash},
            code=code,
            details={"approved": verdict.approved, "forced": verdict.forced},
        )
    return verdict


def _reward_accuracy(config: RunConfig, figures: dict[str, dict[str, dict[str, float]]]) -> Rule:
    measured = figures["after"]["reward_accuracy"]
    low, limit = measured["low"], config.gate.min_reward_accuracy
    passed = low > limit
    word = "exceeds" if passed else "does not exceed"
    return Rule(
        name="min_reward_accuracy",
        value=low,
        limit=limit,
        passed=passed,
        explanation=(
            f"reward accuracy {measured['value']:.3f}: its lower 95 % bound {low:.3f} {word} "
            f"{limit:.3f}"
        ),
    )
