"""The report as Markdown: what Kubeflow shows beside the page, and what a terminal can read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.evaluate.bounds import largest, shortened

_LONGEST_CHARACTERS = 2000
_MOST_SAMPLES = 20


def markdown_report(
    headline: str,
    evaluation: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any] | None,
    settings: Mapping[str, str],
    provenance: Mapping[str, Mapping[str, str]],
    verdict_mark: str,
) -> str:
    """The whole report; ``verdict_mark`` stands where the gate's verdict goes."""
    parts = [
        ["# Evaluation", "", verdict_mark, "", f"**{headline}**"],
        _findings(evaluation),
        _figures(evaluation),
        _slices(evaluation),
        _calibration(evaluation),
        _answers(evaluation),
        _samples(samples),
        _data(data),
        _settings(settings),
        _provenance(provenance),
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts if part)


def cell(text: object) -> str:
    """A text that cannot leave its cell of a table."""
    plain = " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("<", "&lt;").replace("`", "\\`")


def fenced(text: str) -> str:
    """A code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _interval(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _findings(evaluation: Mapping[str, Any]) -> list[str]:
    return [f"- {cell(finding['text'])}" for finding in evaluation["findings"]]


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    from dpo.evaluate.report import FIGURES

    part = "" if evaluation["part"] == "all" else f", {evaluation['part']} part"
    lines = ["## What changed", ""]
    lines += [
        f"{evaluation['n_pairs']} held-out pairs of {evaluation['n_prompts']} prompts{part}; 95 % "
        "intervals by resampling prompts.",
        "",
    ]
    lines += ["| figure | before (SFT) | after (policy) | change |", "|---|---|---|---|"]
    for key, label, _ in FIGURES:
        before, after = evaluation["before"].get(key), evaluation["after"][key]
        change = evaluation["change"].get(key)
        lines.append(
            f"| {label} | {_interval(before)} | {_interval(after)} | {_interval(change)} |"
        )
    if kl := evaluation.get("kl"):
        lines += [
            "",
            f"KL divergence from the SFT model: {_interval(kl['per_answer'])} nats an answer, "
            f"{_interval(kl['per_token'])} a token, on {kl['n_answers']} answers sampled from the "
            "policy (Schulman's k3).",
        ]
    return lines


def _slices(evaluation: Mapping[str, Any]) -> list[str]:
    lines = ["## Where it holds", "", "| pairs | number | reward accuracy |", "|---|---|---|"]
    for key in ("source", "prompt_tokens", "length_difference"):
        every = evaluation["slices"][key]
        rows = largest(every, lambda row: row["n_pairs"])
        for row in rows:
            name = f"{key.replace('_', ' ')}: {shortened(row['slice'])}"
            accuracy = _interval(row["reward_accuracy"])
            lines.append(f"| {cell(name)} | {row['n_pairs']} | {accuracy} |")
        if len(rows) < len(every):
            left_out = len(every) - len(rows)
            lines.append(f"| {key.replace('_', ' ')}: {left_out} smaller ones are left out | | |")
    return lines


def _calibration(evaluation: Mapping[str, Any]) -> list[str]:
    found = evaluation["calibration"]
    return [
        f"Area under the ROC curve of the implicit reward: {_interval(found['auc'])}; expected "
        f"calibration error: {_interval(found['ece'])}."
    ]


def _answers(evaluation: Mapping[str, Any]) -> list[str]:
    from dpo.evaluate.report import ANSWER_FIGURES

    answers = evaluation.get("answers")
    if not answers:
        return []
    names = [name for name in ("sft", "policy", "published") if name in answers]
    lines = ["## Answers", "", f"| figure | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, label in ANSWER_FIGURES:
        cells = " | ".join(_interval(answers[name][key]) for name in names)
        lines.append(f"| {label} | {cells} |")
    judged = evaluation.get("judge")
    if judged and "win_rate" in judged:
        reasons = ", ".join(f"{cell(reason)} ({n})" for reason, n in judged["left_out"].items())
        left_out = f"; {judged['n_left_out']} left out, without a verdict: {reasons}"
        lines += [
            "",
            f"Judged by {cell(judged['model'])}: win rate {_interval(judged['win_rate'])}, "
            f"length-controlled {_interval(judged['win_rate_length_controlled'])}, on "
            f"{judged['n_judged']} of {judged['n_asked']} prompts"
            f"{left_out if reasons else ''}.",
        ]
    return lines


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for number, sample in enumerate(samples[:_MOST_SAMPLES], 1):
        change = sample.get("reward_change")
        shown = "" if change is None else f", reward change {change:+.3f}"
        lines += [f"### Prompt {number} ({cell(sample['dataset'])}{shown})", ""]
        for title, key in (("Prompt", "prompt"), ("SFT", "sft"), ("Policy", "policy")):
            lines += [f"{title}:", "", fenced(str(sample[key])[:_LONGEST_CHARACTERS]), ""]
        if sample.get("published") is not None:
            text = fenced(str(sample["published"])[:_LONGEST_CHARACTERS])
            lines += ["Published:", "", text, ""]
    if len(samples) > _MOST_SAMPLES:
        lines += [f"{len(samples) - _MOST_SAMPLES} more are in samples.json."]
    return lines


def _data(data: Mapping[str, Any] | None) -> list[str]:
    if not data:
        return []
    return [
        "## Data",
        "",
        f"{data['pairs']} pairs of {data['rows']} rows: {data['train_pairs']} to train on, "
        f"{data['test_pairs']} held out, {data['rejected']} rows rejected.",
    ]


def _settings(settings: Mapping[str, str]) -> list[str]:
    lines = ["## Configuration", ""]
    for stage, text in settings.items():
        lines += [f"{stage}:", "", fenced(text), ""]
    return lines


def _provenance(provenance: Mapping[str, Mapping[str, str]]) -> list[str]:
    lines = ["## Provenance", "", "| what | value |", "|---|---|"]
    for group, values in provenance.items():
        lines += [
            f"| {cell(group)}: {cell(name)} | {cell(value) or '–'} |"
            for name, value in values.items()
        ]
    return lines
