"""The report as Markdown: what Kubeflow shows beside the page, and what a terminal can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpo.evaluate.bounds import clipped, largest, shortened
from dpo.evaluate.escaped import cell, fenced
from dpo.evaluate.numbers import interval_text, number_text, percent_text, signed_text

_LONGEST_CHARACTERS = 2000
_MOST_SAMPLES = 20


def markdown_report(
    headline: str,
    evaluation: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
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
        _curves(curves),
        _slices(evaluation),
        _calibration(evaluation),
        _answers(evaluation),
        _samples(samples),
        _data(data),
        _settings(settings),
        _provenance(provenance),
    ]
    return "\n".join("\n".join([*part, ""]) for part in parts if part)


def _findings(evaluation: Mapping[str, Any]) -> list[str]:
    return [
        f"- {'**Warning.** ' if finding['tone'] == 'warning' else ''}{cell(finding['text'])}"
        for finding in evaluation["findings"]
    ]


def _figures(evaluation: Mapping[str, Any]) -> list[str]:
    from dpo.evaluate.report import FIGURES, change_text

    published = evaluation.get("published", {})
    measured = "reward_accuracy" in published
    part = "" if evaluation["part"] == "all" else f", {evaluation['part']} part"
    lines = ["## What changed", ""]
    lines += [
        f"{evaluation['n_pairs']} held-out pairs of {evaluation['n_prompts']} prompts{part}; 95 % "
        "intervals by resampling prompts.",
        "",
    ]
    titles = ["figure", "before (SFT)", "after (policy)", "change"]
    titles += ["published"] if measured else []
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for key, label, _ in FIGURES:
        before, after = evaluation["before"].get(key), evaluation["after"][key]
        cells = [label, interval_text(before), interval_text(after)]
        cells.append(change_text(evaluation["change"], key))
        cells += [interval_text(published.get(key))] if measured else []
        lines.append(f"| {' | '.join(cells)} |")
    if kl := evaluation.get("kl"):
        lines += [
            "",
            f"KL divergence from the SFT model: {interval_text(kl['per_answer'])} nats an answer, "
            f"{interval_text(kl['per_token'])} a token, on {kl['n_answers']} answers sampled from "
            "the policy (Schulman's k3).",
        ]
    return lines


def _curves(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where each learning curve begins and ends; its picture is in the page."""
    if not curves:
        return []
    lines = ["## Learning curves", "", "| curve | first step | last step | steps |"]
    lines.append("|---|---|---|---|")
    for curve in curves:
        first, last = (number_text(curve[name], 4) for name in ("first", "last"))
        lines.append(f"| {cell(curve['title'])} | {first} | {last} | {curve['n_steps']} |")
    return lines


def _slices(evaluation: Mapping[str, Any]) -> list[str]:
    lines = ["## Where it holds", "", "| pairs | number | reward accuracy |", "|---|---|---|"]
    for key in ("source", "prompt_tokens", "length_difference"):
        every = evaluation["slices"][key]
        rows = largest(every, lambda row: row["n_pairs"])
        for row in rows:
            name = f"{key.replace('_', ' ')}: {shortened(row['slice'])}"
            accuracy = interval_text(row["reward_accuracy"])
            lines.append(f"| {cell(name)} | {row['n_pairs']} | {accuracy} |")
        if len(rows) < len(every):
            left_out = len(every) - len(rows)
            lines.append(f"| {key.replace('_', ' ')}: {left_out} smaller ones are left out | | |")
    return lines


def _calibration(evaluation: Mapping[str, Any]) -> list[str]:
    found = evaluation["calibration"]
    return [
        f"Area under the ROC curve of the implicit reward: {interval_text(found['auc'])}; expected "
        f"calibration error: {interval_text(found['ece'])}."
    ]


def _answers(evaluation: Mapping[str, Any]) -> list[str]:
    from dpo.evaluate.report import ANSWER_FIGURES, PERCENTILES, percentiles_text

    answers = evaluation.get("answers")
    if not answers:
        return []
    names = [name for name in ("sft", "policy", "published") if name in answers]
    lines = ["## Answers", "", f"| figure | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, label in ANSWER_FIGURES:
        figures = (answers[name][key] for name in names)
        shown = (interval_text(f, 1) if key == "tokens" else percent_text(f) for f in figures)
        cells = " | ".join(shown)
        lines.append(f"| {label} | {cells} |")
    cells = " | ".join(percentiles_text(answers[name]) for name in names)
    lines.append(f"| {PERCENTILES} | {cells} |")
    if growth := answers.get("length_growth"):
        lines += ["", f"The policy's answers are {interval_text(growth)} times as long."]
    judged = evaluation.get("judge")
    if judged and "win_rate" in judged:
        reasons = ", ".join(f"{cell(reason)} ({n})" for reason, n in judged["left_out"].items())
        left_out = f"; {judged['n_left_out']} left out, without a verdict: {reasons}"
        lines += [
            "",
            f"Judged by {cell(judged['model'])}: win rate {interval_text(judged['win_rate'])}, "
            f"length-controlled {interval_text(judged['win_rate_length_controlled'])}, on "
            f"{judged['n_judged']} of {judged['n_asked']} prompts"
            f"{left_out if reasons else ''}.",
        ]
    return lines


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for number, sample in enumerate(samples[:_MOST_SAMPLES], 1):
        change = sample.get("reward_change")
        shown = "" if change is None else f", reward change {signed_text(change)}"
        lines += [f"### Prompt {number} ({cell(sample['dataset'])}{shown})", ""]
        for title, key in (("Prompt", "prompt"), ("SFT", "sft"), ("Policy", "policy")):
            lines += [f"{title}:", "", fenced(clipped(str(sample[key]), _LONGEST_CHARACTERS)), ""]
        if sample.get("published") is not None:
            text = fenced(clipped(str(sample["published"]), _LONGEST_CHARACTERS))
            lines += ["Published:", "", text, ""]
    if len(samples) > _MOST_SAMPLES:
        lines += [f"{len(samples) - _MOST_SAMPLES} more are in samples.json."]
    return lines


def _data(data: Mapping[str, Any] | None) -> list[str]:
    if not data:
        return []
    reasons = ", ".join(f"{cell(name)}: {n}" for name, n in data["reasons"].items())
    lines = [
        "## Data",
        "",
        f"{data['pairs']:,} pairs of {data['rows']:,} rows: {data['train_pairs']:,} to train on, "
        f"{data['test_pairs']:,} held out, {data['rejected']:,} rows rejected"
        f"{f' ({reasons})' if reasons else ''}, {data['near_duplicates']:,} near duplicates.",
        "",
        "| source | pairs | rejected rows | fingerprint |",
        "|---|---|---|---|",
    ]
    for source in data["sources"]:
        figures = f"{source['pairs']:,} | {source['rejected']:,}"
        lines.append(f"| {cell(source['name'])} | {figures} | {cell(source['fingerprint'])} |")
    if left_out := data["n_sources_left_out"]:
        lines.append(f"| {left_out:,} smaller ones are left out | | | |")
    return lines


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
