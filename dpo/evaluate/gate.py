"""The gate: whether the held-out figures are good enough to publish. Imports no torch.

It is never cached, and the only step that reads what is published. A refusal is a result: the
verdict is written, and a copy of the report with the verdict on top.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.errors import ArtifactError
from dpo.evaluate.rules import Rule, check_rules
from dpo.evaluate.standing import Standing, is_unchanged, standing
from dpo.evaluate.verdict_text import with_verdict
from dpo.storage.manifest import read_manifest, staged, write_manifest

FORMAT_VERSION = 2
"""Of ``verdict.json``; 1 had neither ``unchanged`` nor ``published``."""


@dataclass(frozen=True)
class Verdict:
    """The decision on a policy."""

    approved: bool
    forced: bool
    """Approved although a rule failed, because ``gate.force`` is set."""
    rules: tuple[Rule, ...]
    evaluation: str
    """Content hash of the evaluation that was judged."""
    unchanged: bool = False
    """The policy is the published version, byte for byte: approved whatever the rules say."""
    published: dict[str, Any] = field(default_factory=dict)
    """The version that was published when the gate looked: hash, run, why it cannot be read."""
    format_version: int = FORMAT_VERSION


def run_gate(config: RunConfig, output: Path, *, evaluation: Path, code: str = "") -> Verdict:
    """Apply the rules to an evaluation and write ``verdict.json`` into the folder ``output``.

    A refusal is a result: it raises nothing. A published version that cannot be read fails the one
    rule that needs it.

    Raises:
        ArtifactError: the evaluation is incomplete or changed.
    """
    judged = read_manifest(evaluation, stage="evaluate")
    now = standing(config.publish.store, config.publish.name)
    try:
        figures = json.loads((evaluation / "evaluation.json").read_text(encoding="utf-8"))
        rules = check_rules(config.gate, figures, now)
        verdict = _decide(config, figures, rules, now, judged.content_hash)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArtifactError(
            f"the evaluation cannot be read: {error!r}",
            where=str(evaluation / "evaluation.json"),
            fix="run the step evaluate again",
        ) from None
    with staged(output) as folder:
        text = json.dumps(asdict(verdict), indent=1, sort_keys=True)
        (folder / "verdict.json").write_text(text, encoding="utf-8")
        for name in ("report.html", "report.md"):
            if (evaluation / name).is_file():
                report = (evaluation / name).read_text(encoding="utf-8")
                (folder / name).write_text(with_verdict(report, asdict(verdict)), encoding="utf-8")
        write_manifest(
            folder,
            "gate",
            settings=stage_settings(config, "gate"),
            inputs={"evaluation": judged.content_hash},
            code=code,
            details={
                "approved": verdict.approved,
                "forced": verdict.forced,
                "unchanged": verdict.unchanged,
            },
        )
    return verdict


def _decide(
    config: RunConfig, figures: dict[str, Any], rules: tuple[Rule, ...], now: Standing, judged: str
) -> Verdict:
    passed = all(rule.passed for rule in rules)
    unchanged = is_unchanged(figures.get("policy") or {}, now)
    good = passed or unchanged
    return Verdict(
        approved=good or config.gate.force,
        forced=config.gate.force and not good,
        rules=rules,
        evaluation=judged,
        unchanged=unchanged,
        published={
            "content_hash": now.content_hash,
            "run_id": now.run_id,
            "problem": now.problem,
        },
    )
