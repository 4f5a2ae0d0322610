"""The gate's rules: each compares one figure of an evaluation with one limit. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpo.config.schema import GateConfig
from dpo.evaluate.numbers import WITHIN, finite, share_text
from dpo.evaluate.standing import Standing

_ROUNDING = 1e-9
"""0.70 - 0.65 is a little less than 0.05: a difference is not refused for that."""


@dataclass(frozen=True)
class Rule:
    """One rule with its figure and limit."""

    name: str
    value: float | None
    """None where there is no figure, or nothing to compare with."""
    limit: float
    passed: bool
    explanation: str


def check_rules(
    config: GateConfig, evaluation: Mapping[str, Any], published: Standing
) -> tuple[Rule, ...]:
    """Every rule that is on, in a fixed order.

    Raises:
        KeyError: the evaluation has no reward accuracy at all.
    """
    rules = [_reward_accuracy(config.min_reward_accuracy, evaluation)]
    if config.min_improvement is not None:
        rules.append(_improvement(config.min_improvement, evaluation, published))
    return (*rules, *_maxima(config, evaluation))


def _reward_accuracy(limit: float, evaluation: Mapping[str, Any]) -> Rule:
    measured = evaluation["after"]["reward_accuracy"]
    low = measured["low"]
    passed = low > limit
    word = "exceeds" if passed else "does not exceed"
    own, other = _apart(low, limit)
    return Rule(
        name="min_reward_accuracy",
        value=low,
        limit=limit,
        passed=passed,
        explanation=(
            f"reward accuracy {measured['value']:.3f}: its lower 95 % bound {own} {word} {other}"
        ),
    )


def _improvement(limit: float, evaluation: Mapping[str, Any], published: Standing) -> Rule:
    def rule(value: float | None, passed: bool, explanation: str) -> Rule:
        return Rule("min_improvement", value, limit, passed, explanation)

    if not published.content_hash and not published.problem:
        return rule(None, True, "nothing is published yet: there is nothing to improve on")
    value, how = _gained(evaluation, published)
    if value is None:
        return rule(
            None,
            False,
            f"the published version cannot be compared with: {published.problem or how}; publish "
            "it again, leave gate.min_improvement out, or decide with gate.force=true",
        )
    passed = value + _ROUNDING >= limit
    word = "at least" if passed else "less than"
    own, other = _apart(value, limit, sign="+")
    return rule(
        value,
        passed,
        f"reward accuracy changed by {own} over the published version "
        f"{published.content_hash[:12]}, {word} {other} ({how})",
    )


def _gained(evaluation: Mapping[str, Any], published: Standing) -> tuple[float | None, str]:
    """Difference in reward accuracy to the published version, and on what it was measured."""
    measured = evaluation.get("published") or {}
    if str(measured.get("url", "")).rstrip("/").endswith(published.content_hash or "-"):
        paired = finite(measured, "improvement", "reward_accuracy", "value")
        if paired is not None:
            return paired, "both measured here on the same pairs"
    theirs = finite(published.evaluation or {}, "after", "reward_accuracy", "value")
    ours = finite(evaluation, "after", "reward_accuracy", "value")
    if theirs is None or ours is None:
        return None, "its reward accuracy is missing or no number"
    pairs, its_pairs = evaluation.get("held_out"), (published.evaluation or {}).get("held_out")
    if pairs and pairs == its_pairs:
        return ours - theirs, "each measured in its run on the same pairs"
    # figures of format 1 do not say on which they were measured
    which = "other held-out pairs" if pairs and its_pairs else "pairs that nobody noted"
    return ours - theirs, (
        f"measured in its run on {which}, so compare with care: evaluation.published=URL measures "
        "both on the same"
    )


def _maxima(config: GateConfig, evaluation: Mapping[str, Any]) -> Iterator[Rule]:
    table: tuple[tuple[str, float | None, tuple[str, ...], str, str], ...] = (
        (
            "max_kl",
            config.max_kl,
            ("kl", "per_answer", "value"),
            "KL divergence from the SFT model in nats an answer",
            "evaluation.n_kl_samples",
        ),
        (
            "max_length_growth",
            config.max_length_growth,
            ("answers", "length_growth", "value"),
            f"mean answer length as a multiple of the SFT model's{_unended(evaluation)}",
            "evaluation.n_samples, where not all of the SFT model's answers are empty",
        ),
        (
            "max_repetition",
            config.max_repetition,
            ("answers", "policy", "repetition", "value"),
            "share of repeated 4-grams in the answers",
            "evaluation.n_samples",
        ),
        (
            "max_perplexity_growth",
            config.max_perplexity_growth,
            ("change", "perplexity_growth", "value"),
            "perplexity of chosen responses as a multiple of the SFT model's",
            "the step evaluate again",
        ),
    )
    for name, limit, keys, what, source in table:
        if limit is not None:
            yield _maximum(name, limit, finite(evaluation, *keys), what, source)


def _unended(evaluation: Mapping[str, Any]) -> str:
    """How many answers of both models were cut: nobody knows how much longer they would be."""
    models = {"policy": "the policy's answers", "sft": "the SFT model's"}
    shares = {
        what: finite(evaluation, "answers", name, "cut_off", "value")
        for name, what in models.items()
    }
    if not any(shares.values()):
        return ""
    told = [f"{share_text(share)} of {what}" for what, share in shares.items() if share is not None]
    return f" ({' and '.join(told)} did not end {WITHIN}, so growth beyond that is not measured)"


def _maximum(name: str, limit: float, value: float | None, what: str, source: str) -> Rule:
    if value is None:
        text = f"{what}: the evaluation has no such figure; it comes from {source}"
        return Rule(name, None, limit, False, text)
    passed = value <= limit + _ROUNDING
    word = "is within" if passed else "exceeds"
    own, other = _apart(value, limit)
    return Rule(name, value, limit, passed, f"{what}: {own} {word} {other}")


def _apart(value: float, limit: float, sign: str = "") -> tuple[str, str]:
    """Both with as many decimals, at least three, as it takes to see the limit and a difference."""

    def seen(n: int) -> bool:
        return f"{value:.{n}f}" != f"{limit:.{n}f}" and bool(float(f"{limit:.{n}f}")) == bool(limit)

    digits = next((n for n in range(3, 9) if seen(n)), 3)
    return f"{value:{sign}.{digits}f}", f"{limit:{sign}.{digits}f}"
