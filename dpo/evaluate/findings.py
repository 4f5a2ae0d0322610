"""What a reader of the figures should not miss, in words: length bias, collapse and the like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dpo.evaluate.numbers import WITHIN, share_text

ROUNDING = 1e-6
"""Of a sum of log-probabilities in float32, as a share of it."""
_COLLAPSE_SHARE = 0.2
"""A chosen log-prob that fell by more than this share of its start has collapsed."""
_MISCALIBRATED = 0.1
_EMPTY_SHARE = 0.05
_LONGER = 1.5
_MORE_REPETITION = 0.1
_MORE_UNENDED = 0.1
_FEW_PROMPTS = 20

Figure = Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """One sentence about a run."""

    kind: str
    tone: Literal["good", "warning", "note"]
    text: str


def findings(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is worth calling out in an evaluation's figures, the gravest first."""
    makers = (
        _models,
        _other_pairs,
        _other_loss,
        _few_prompts,
        _chosen_log_probs,
        _length_bias,
        _calibration,
        _answers,
        _judge,
    )
    found = [finding for maker in makers for finding in maker(evaluation)]
    found.sort(key=lambda finding: finding.tone != "warning")
    return [asdict(finding) for finding in found]


def _range(figure: Figure, digits: int = 2) -> str:
    low, high = f"{figure['low']:.{digits}f}", f"{figure['high']:.{digits}f}"
    return f"{figure['value']:.{digits}f} [{low}, {high}]".replace("-", "−")


def other_loss(trained: Mapping[str, Any], measured: Mapping[str, Any]) -> tuple[str, str] | None:
    """What differs between the loss of a policy and the one of its rewards, as settings; or None.

    What only one of them has is a setting that the other's version of the code did not know.
    """
    both = sorted(trained.keys() & measured.keys(), key=lambda key: (key != "name", key))
    differing = [key for key in both if trained[key] != measured[key]]
    if not differing:
        return None
    shown = [key for key in both if key in ("name", "beta") or key in differing]
    first, second = (
        " ".join(f"{'loss' if key == 'name' else f'loss.{key}'}={loss[key]}" for key in shown)
        for loss in (trained, measured)
    )
    return first, second


def _other_loss(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    trained = (evaluation.get("policy") or {}).get("loss") or {}
    if differing := other_loss(trained, evaluation.get("loss") or {}):
        yield Finding(
            "other_loss",
            "warning",
            f"The policy was trained with {differing[0]}, but rewards, margins and loss are "
            f"measured with {differing[1]}.",
        )


def _models(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    """What the names of the two models stand for, where they are of other steps or of nobody's."""
    models = evaluation.get("models") or {}
    if not models:
        return
    sft, policy = models["sft"], models["policy"]
    if (sft["step"], policy["step"]) != ("sft", "preference"):
        yield Finding(
            "models",
            "note",
            f"What this report calls the SFT model is {_model_text(sft)}; what it calls the policy "
            f"is {_model_text(policy)}.",
        )
    if sft.get("end"):
        yield Finding(
            "ends",
            "warning",
            f"The SFT model ends its answers with {sft['end']}, the policy with {policy['end']}: "
            "both were measured with that of the policy, which favours it.",
        )


def _other_pairs(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    """Held out of one output of ingest, a pair may be trained on in another."""
    models = evaluation.get("models") or {}
    names: dict[str, tuple[str, Literal["warning", "note"]]]
    names = {"policy": ("policy", "warning"), "sft": ("SFT model", "note")}
    for name, (shown, tone) in names.items():
        if hashes := models.get(name, {}).get("trained_on"):
            yield Finding(
                "other_pairs",
                tone,
                f"The {shown} was trained on other outputs of ingest than these pairs are held out "
                f"of ({', '.join(hash_[:12] for hash_ in hashes)}): it may have seen them.",
            )


def unseen(evaluation: Mapping[str, Any]) -> bool:
    """Whether it was recorded that neither model was trained on the held-out pairs."""
    models = evaluation.get("models") or {}
    return all(models.get(name, {}).get("trained_on") == [] for name in ("sft", "policy"))


def _model_text(model: Mapping[str, str]) -> str:
    made = {"sft": "an output of SFT", "preference": "an output of preference training"}
    kind = made.get(model["step"], "a model that was made elsewhere")
    told = [model[key] for key in ("folder", "model_type", "dtype") if model.get(key)]
    return f"{kind} ({', '.join([*told, model['content_hash'][:12]])})"


def _few_prompts(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    n_prompts = evaluation.get("n_prompts", _FEW_PROMPTS)
    if n_prompts == 1:
        yield Finding(
            "few_prompts",
            "warning",
            "All held-out pairs have one prompt: it cannot tell how far these figures hold for "
            "others, and the intervals of means have no width.",
        )
    elif n_prompts < _FEW_PROMPTS:
        yield Finding(
            "few_prompts",
            "warning",
            f"Only {n_prompts} prompts are held out: figures and intervals are rough.",
        )


def _chosen_log_probs(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    change = evaluation["change"]["chosen_logp"]
    start = evaluation["before"]["chosen_logp"]["value"]
    if change["high"] >= -ROUNDING * abs(start):
        return
    share = change["value"] / start if start else 0.0
    if share > _COLLAPSE_SHARE:
        yield Finding(
            "collapse",
            "warning",
            f"The chosen responses collapsed: their log-probability fell by {share_text(share)} of "
            f"its start ({_range(change, 1)} nats a response). The loss does not show it; raise "
            "beta, lower the learning rate, or add an SFT term (loss.sft_weight).",
        )
    else:
        yield Finding(
            "chosen_fell",
            "note",
            f"The chosen responses became a little less likely ({_range(change, 1)} nats a "
            "response), as DPO often does: it needs only their lead to grow.",
        )


def _length_bias(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    bias = evaluation["slices"]["length_bias"]
    if bias is None or bias["low"] <= 0:
        return
    yield Finding(
        "length_bias",
        "warning",
        "Length bias: reward accuracy is higher where the chosen response is the longer one than "
        f"where the rejected one is, by {_range(bias)}. The policy may have learned length.",
    )


def _calibration(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    error = evaluation["calibration"]["ece"]
    if error["low"] > _MISCALIBRATED:
        yield Finding(
            "calibration",
            "note",
            "The implicit reward is badly calibrated: its confidence differs from its accuracy by "
            f"{_range(error)} on average. Do not read margins as probabilities.",
        )


def _answers(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    answers = evaluation.get("answers")
    if not answers:
        return
    sft, policy = answers["sft"], answers["policy"]
    growth = answers.get("length_growth")
    if growth and growth["value"] > _LONGER:
        yield Finding(
            "longer", "warning", f"The answers grew to {_range(growth)} times the SFT model's."
        )
    unended, before = policy["cut_off"]["value"], sft["cut_off"]["value"]
    if unended - before > _MORE_UNENDED:
        yield Finding(
            "unended",
            "warning",
            f"{share_text(unended)} of the policy's answers did not end {WITHIN}, of the SFT "
            f"model's {share_text(before)}: growth beyond that is not measured.",
        )
    if policy["empty"]["value"] > _EMPTY_SHARE:
        share = policy["empty"]["value"]
        yield Finding("empty", "warning", f"{share_text(share)} of the policy's answers are empty.")
    if policy["repetition"]["value"] - sft["repetition"]["value"] > _MORE_REPETITION:
        yield Finding(
            "repetition",
            "warning",
            "The policy repeats itself more: the share of repeated 4-grams rose from "
            f"{sft['repetition']['value']:.2f} to {policy['repetition']['value']:.2f}.",
        )


def _judge(evaluation: Mapping[str, Any]) -> Iterator[Finding]:
    judged = evaluation.get("judge")
    if judged and judged["problem"]:
        first = judged["problem"].splitlines()[0]
        yield Finding(
            "judge",
            "warning",
            f"The judge judged {judged['n_judged']} of {judged['n_asked']} answers: {first}.",
        )
