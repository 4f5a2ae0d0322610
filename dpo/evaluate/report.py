"""The report: one self-contained HTML file and the same as Markdown.

It is written by the evaluation; the gate puts its verdict into a copy (``with_verdict``). Prompts
and answers are hostile text: every value passes through Jinja's escaping, and what is marked up
here is escaped piece by piece first. The page carries a policy that forbids all network access.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo.evaluate import charts
from dpo.evaluate.bounds import PAGE_BYTES, clipped, first_values, in_bytes, largest, shortened
from dpo.evaluate.findings import ROUNDING, unseen
from dpo.evaluate.markdown import markdown_report
from dpo.evaluate.numbers import interval_text, percent_text, signed_text
from dpo.evaluate.samples import BUDGET_BYTES, CHANGES, shown_samples
from dpo.evaluate.verdict_text import MARK

_TEMPLATES = Path(__file__).resolve().parent / "templates"
FIGURES = (
    ("reward_accuracy", "Reward accuracy", "share of pairs whose chosen response gained more"),
    ("accuracy_sum", "Log-prob accuracy", "share whose chosen response is likelier, summed"),
    ("accuracy_per_token", "Log-prob accuracy per token", "the same, averaged over tokens"),
    ("reward_margin", "Reward margin", "chosen minus rejected reward"),
    ("loss", "Preference loss", "on held-out pairs"),
    ("chosen_logp", "Chosen log-prob", "summed over a response, in nats"),
    ("rejected_logp", "Rejected log-prob", "summed over a response, in nats"),
    ("perplexity", "Perplexity of chosen", "exp of the mean loss per token"),
)
"""Key, name and meaning of the figures in the order of the report."""
SHARES = {"reward_accuracy", "accuracy_sum", "accuracy_per_token"}
ANSWER_FIGURES = (
    ("tokens", "Tokens an answer"),
    ("repetition", "Share of repeated 4-grams"),
    ("empty", "Empty answers"),
    ("cut_off", "Answers that did not end"),
)
PERCENTILES = "Tokens: median (5 % to 95 %)"
_CURVES = (
    ("loss/train", "training loss"),
    ("nll_train/per_token", "training loss per token"),
    ("rewards_train/accuracies", "training reward accuracy"),
    ("rewards_train/margins", "training reward margin"),
    ("logps_train/chosen", "training chosen log-prob"),
    ("grad_norm", "gradient norm"),
)
_SLICES = (
    ("source", "By source"),
    ("prompt_tokens", "By prompt length"),
    ("length_difference", "By difference in length"),
)
_LONGEST_SETTINGS = 16_000
_FOR_THE_REST = 20_000
"""Bytes for the gate's verdict, and what stands around the samples once."""


def write_reports(
    folder: Path,
    *,
    evaluation: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, Path],
    data_report: Path,
) -> None:
    """Write ``report.html`` and ``report.md`` into ``folder``."""
    text, tone = headline(evaluation)
    data = _data_figures(data_report)
    shown_settings = {
        stage: clipped(
            json.dumps(values, indent=2, sort_keys=True), _LONGEST_SETTINGS, "its manifest"
        )
        for stage, values in settings.items()
    }
    origins = {name: first_values(values, "the manifests") for name, values in provenance.items()}
    drawn = _charts(curves)
    page = {
        "headline": text,
        "tone": tone,
        "e": evaluation,
        "unseen": unseen(evaluation),
        "rows": [_row(evaluation, *figure) for figure in FIGURES],
        "columns": _columns(evaluation),
        "slices": _slices(evaluation),
        "calibration": _calibration(evaluation),
        "charts": drawn,
        "answer_figures": ANSWER_FIGURES,
        "percentiles": PERCENTILES,
        "changes": CHANGES,
        "data": data,
        "settings": shown_settings,
        "provenance": origins,
        "verdict_mark": Markup(MARK),
    }
    html = _page(page, samples)
    (folder / "report.html").write_text(html, encoding="utf-8", errors="replace")
    text = markdown_report(text, evaluation, samples, drawn, data, shown_settings, origins, MARK)
    (folder / "report.md").write_text(text, encoding="utf-8", errors="replace")


def _page(page: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The page with as many of the samples as the rest of it leaves room for."""
    template = environment().get_template("report.html.j2")
    rest = in_bytes(template.render(page, samples=[]))
    shown = shown_samples(samples, min(BUDGET_BYTES, PAGE_BYTES - _FOR_THE_REST - rest))
    return template.render(
        page,
        samples=shown,
        n_left_out=len(samples) - len(shown),
        sources=sorted({sample["dataset"] for sample in shown}),
    )


@cache
def environment() -> Environment:
    """Jinja with escaping, over our templates."""
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    found.filters |= {
        "interval": interval_text,
        "percent": percent_text,
        "signed": signed_text,
        "percentiles": percentiles_text,
    }
    return found


def headline(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict of the figures in a sentence, and its tone: ``good`` or ``bad``."""
    accuracy, chance = evaluation["after"]["reward_accuracy"], evaluation["chance"]
    if _is_unmoved(evaluation):
        return (
            "The policy is no other than the SFT model: the log-probabilities of the held-out "
            "responses are the same but for rounding, so their rewards say nothing.",
            "bad",
        )
    shown = f"{accuracy['value']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}]"
    if accuracy["low"] > chance:
        return (
            f"The policy learned the preference: reward accuracy {shown} on held-out pairs, "
            f"clearly above chance ({chance:.2f}).",
            "good",
        )
    if accuracy["high"] < chance:
        return (
            f"The policy learned the opposite of the preference: reward accuracy {shown} on "
            f"held-out pairs, below chance ({chance:.2f}). Check the labels.",
            "bad",
        )
    return (
        f"These pairs do not show whether the policy learned the preference: reward accuracy "
        f"{shown}, where chance is {chance:.2f}. More held-out pairs or more training would tell.",
        "bad",
    )


def _is_unmoved(evaluation: Mapping[str, Any]) -> bool:
    """Whether rewards are rounding: packed in other rows, equal weights differ in the last bits."""
    return all(
        max(abs(evaluation["change"][name][bound]) for bound in ("low", "high"))
        <= ROUNDING * abs(evaluation["before"][name]["value"])
        for name in ("chosen_logp", "rejected_logp")
    )


def _columns(evaluation: Mapping[str, Any]) -> list[str]:
    measured = "reward_accuracy" in evaluation.get("published", {})
    return ["before", "after", "change", *(["published"] if measured else [])]


def _row(evaluation: Mapping[str, Any], key: str, label: str, meaning: str) -> dict[str, Any]:
    after = evaluation["after"][key]
    bar = charts.interval_bar(after, evaluation["chance"]) if key in SHARES else ""
    return {
        "label": label,
        "meaning": meaning,
        "before": interval_text(evaluation["before"].get(key)),
        "after": interval_text(after),
        "change": change_text(evaluation["change"], key),
        "published": interval_text(evaluation.get("published", {}).get(key)),
        # built from numbers alone
        "bar": Markup(bar),
    }


def change_text(change: Mapping[str, Any], key: str) -> str:
    """What changed in a figure, as a difference; as a factor where it is the perplexity."""
    if key == "perplexity":
        return f"× {interval_text(change['perplexity_growth'])}"
    return interval_text(change.get(key))


def percentiles_text(answers: Mapping[str, Any]) -> str:
    """How the lengths of a model's answers are spread."""
    found = answers["tokens_percentiles"]
    return f"{found['50']:.0f} ({found['5']:.0f} to {found['95']:.0f})"


def _slices(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key, title in _SLICES:
        every = evaluation["slices"][key]
        rows = largest(every, lambda row: row["n_pairs"])
        if len(rows) < len(every):
            title = f"{title}: the largest {len(rows)} of {len(every)}"
        named = [
            (f"{shortened(row['slice'])} ({row['n_pairs']} pairs)", row["reward_accuracy"])
            for row in rows
        ]
        label = f"reward accuracy {title.lower()}: " + ", ".join(
            f"{name} {figure['value']:.2f}" for name, figure in named
        )
        svg = charts.interval_rows(named, title=label, chance=evaluation["chance"])
        if svg:
            # names are escaped by the chart
            found.append({"title": title, "svg": Markup(svg)})
    return found


def _calibration(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = evaluation["calibration"]
    return [
        {
            "title": f"ROC of the implicit reward: area {interval_text(found['auc'], 2)}",
            "svg": Markup(charts.roc_chart(found["roc"], found["auc"])),
        },
        {
            "title": f"Reliability: calibration error {interval_text(found['ece'], 2)}",
            "svg": Markup(charts.reliability_chart(found["reliability"], found["ece"])),
        },
    ]


def _charts(curves: Mapping[str, Path]) -> list[dict[str, Any]]:
    found = []
    for stage, path in curves.items():
        lines = _lines(path)
        for key, name in _CURVES:
            values = [line[key] for line in lines if isinstance(line.get(key), float)]
            if svg := charts.line_chart(f"{stage}: {name}", values):
                # built from numbers and the names above
                title = f"{stage[0].upper()}{stage[1:]}: {name}"
                ends = {"first": values[0], "last": values[-1], "n_steps": len(values)}
                found.append({"title": title, "svg": Markup(svg), **ends})
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _data_figures(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    figures, fingerprints = report["figures"], report.get("sources", {})
    every = list(figures["by_source"].items())
    shown = largest(every, lambda item: item[1]["pairs"])
    rows = [
        {
            "name": shortened(name),
            "pairs": source["pairs"],
            "rejected": source["rejected"],
            "fingerprint": shortened(str(fingerprints.get(name, "–"))),
        }
        for name, source in shown
    ]
    return {**figures, "sources": rows, "n_sources_left_out": len(every) - len(rows)}
