"""The report: one self-contained HTML file and the same as Markdown.

Prompts and answers are hostile text: every value passes through Jinja's escaping, and what is
marked up here (differences, charts) is escaped piece by piece before it is marked safe.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dpo.evaluate.charts import interval_bar, line_chart

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_FIGURES = (
    ("reward_accuracy", "Reward accuracy", "share of pairs whose chosen response gained more"),
    (
        "accuracy_sum",
        "Log-prob accuracy",
        "share of pairs whose chosen response is likelier, summed",
    ),
    ("accuracy_per_token", "Log-prob accuracy per token", "the same, averaged over tokens"),
    ("reward_margin", "Reward margin", "chosen minus rejected reward"),
    ("loss", "Preference loss", "on held-out pairs"),
    ("chosen_logp", "Chosen log-prob", "summed over a response"),
    ("rejected_logp", "Rejected log-prob", "summed over a response"),
)
_SHARES = {"reward_accuracy", "accuracy_sum", "accuracy_per_token"}
_CURVES = (
    ("loss/train", "training loss"),
    ("rewards_train/accuracies", "training reward accuracy"),
    ("rewards_train/margins", "training reward margin"),
    ("grad_norm", "gradient norm"),
)


def write_reports(
    folder: Path,
    *,
    evaluation: Mapping[str, Any],
    samples: Sequence[Mapping[str, str]],
    settings: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Mapping[str, str]],
    curves: Mapping[str, Path],
    data_report: Path,
) -> None:
    """Write ``report.html`` and ``report.md`` into ``folder``."""
    headline, tone = _headline(evaluation)
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("report.html.j2").render(
        headline=headline,
        tone=tone,
        e=evaluation,
        rows=[_row(evaluation, *figure) for figure in _FIGURES],
        charts=_charts(curves),
        samples=[_marked(sample) for sample in samples],
        data=_data_figures(data_report),
        settings={
            stage: json.dumps(values, indent=2, sort_keys=True)
            for stage, values in settings.items()
        },
        inputs=provenance["inputs"],
        code=provenance["code"],
    )
    (folder / "report.html").write_text(html, encoding="utf-8", errors="replace")
    text = _markdown(headline, evaluation, samples)
    (folder / "report.md").write_text(text, encoding="utf-8", errors="replace")


def _headline(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    accuracy = evaluation["after"]["reward_accuracy"]
    interval = f"{accuracy['value']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}]"
    if accuracy["low"] > evaluation["chance"]:
        return (
            f"The policy learned the preference: reward accuracy {interval} on held-out pairs, "
            "clearly above chance (0.50).",
            "good",
        )
    if accuracy["high"] < evaluation["chance"]:
        return (
            f"The policy learned the opposite of the preference: reward accuracy {interval} on "
            "held-out pairs, below chance (0.50). Check the labels.",
            "bad",
        )
    return (
        f"These pairs do not show whether the policy learned the preference: reward accuracy "
        f"{interval}, where chance is 0.50. More held-out pairs or more training would tell.",
        "bad",
    )


def _row(evaluation: Mapping[str, Any], key: str, label: str, meaning: str) -> dict[str, Any]:
    after = evaluation["after"][key]
    bar = interval_bar(after["value"], after["low"], after["high"]) if key in _SHARES else ""
    return {
        "label": label,
        "meaning": meaning,
        "before": _interval(evaluation["before"].get(key)),
        "after": _interval(after),
        # built from numbers alone
        "bar": Markup(bar),
    }


def _interval(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _charts(curves: Mapping[str, Path]) -> list[dict[str, Any]]:
    charts = []
    for stage, path in curves.items():
        lines = _lines(path)
        for key, name in _CURVES:
            values = [line[key] for line in lines if isinstance(line.get(key), float)]
            if svg := line_chart(f"{stage}: {name}", values):
                # built from numbers and the names above
                charts.append({"title": f"{stage}: {name}", "svg": Markup(svg)})
    return charts


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _marked(sample: Mapping[str, str]) -> dict[str, Any]:
    """The sample with the words that only one of the models wrote marked."""
    left, right = (re.findall(r"\s+|\S+", sample[name]) for name in ("sft", "policy"))
    matcher = difflib.SequenceMatcher(a=left, b=right, autojunk=False)
    marked_left, marked_right = [], []
    for operation, a, b, c, d in matcher.get_opcodes():
        old, new = escape("".join(left[a:b])), escape("".join(right[c:d]))
        same = operation == "equal"
        marked_left.append(old if same or not old else Markup("<del>{}</del>").format(old))
        marked_right.append(new if same or not new else Markup("<ins>{}</ins>").format(new))
    join = Markup("").join
    return {**sample, "sft": join(marked_left), "policy": join(marked_right)}


def _data_figures(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures


def _markdown(
    headline: str, evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, str]]
) -> str:
    lines = ["# Evaluation", "", headline, ""]
    lines += [f"{evaluation['n_pairs']} held-out pairs, 95 % intervals.", ""]
    lines += ["| figure | before (SFT) | after (policy) |", "|---|---|---|"]
    for key, label, _ in _FIGURES:
        before, after = evaluation["before"].get(key), evaluation["after"][key]
        lines.append(f"| {label} | {_interval(before)} | {_interval(after)} |")
    for number, sample in enumerate(samples, 1):
        lines += ["", f"## Prompt {number}", ""]
        for title, key in (("Prompt", "prompt"), ("SFT", "sft"), ("Policy", "policy")):
            lines += [f"{title}:", "", _fenced(sample[key]), ""]
    return "\n".join(lines) + "\n"


def _fenced(text: str) -> str:
    """A code block that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
