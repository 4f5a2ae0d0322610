"""The data report: what was accepted, what was rejected and why, how long the texts are.

``report.json`` and ``report.html``; the page needs no network and no script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.data.lengths import length_figures
from dpo.data.quarantine import NOT_FAULTY, Rejected
from dpo.data.reasons import title
from dpo.data.tokenize import Limits

SAMPLE_ROWS = 1000
"""Pairs whose lengths are measured."""
_SHOWN_ROWS = 8
_BIAS = 0.1
_WIDTH, _HEIGHT, _BASE, _HIGH = 320, 130, 110, 102
_SHOWN_EXAMPLES = 2
_SHOWN_PROMPT_CHARS = 110
_NAMES = {"prompt": "Prompts", "chosen": "Preferred answers", "rejected": "Rejected answers"}


def write_report(
    report: dict[str, Any],
    sample: Sequence[dict[str, Any]],
    examples: Mapping[str, Sequence[Rejected]],
    tokenizer: Any,
    limits: Limits,
    folder: Path,
) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``.

    Args:
        report: ``figures`` of the stage, ``sources`` with their fingerprints, and some
            ``near_duplicates``.
        sample: Pair rows to measure and to show.
        examples: Rejected rows by reason.
        tokenizer: The model's.
        limits: Longest lengths, in tokens.
        folder: To write to.
    """
    from jinja2 import Environment, FileSystemLoader

    lengths = length_figures(sample, tokenizer.lengths, limits)
    report = {
        **report,
        "lengths_tokens": lengths,
        "examples": {reason: [str(item) for item in items] for reason, items in examples.items()},
        "sample": sample[:: max(1, len(sample) // _SHOWN_ROWS)][:_SHOWN_ROWS],
    }
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text, encoding="utf-8", errors="replace")
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(autoescape=True, loader=loader)
    environment.filters |= {"count": "{:,}".format, "percent": _percent, "chart": _chart}
    environment.filters["ending"] = _ending
    longer, same = lengths["chosen_longer_share"], lengths["same_length_share"]
    figures = report["figures"]
    html = environment.get_template("data_report.html.j2").render(
        f=figures,
        sources=report["sources"],
        near=report["near_duplicates"],
        reasons=[
            _reason(name, count, figures["by_source"], examples.get(name, ()))
            for name, count in figures["reasons"].items()
        ],
        faulty=sum(n for name, n in figures["reasons"].items() if name not in NOT_FAULTY),
        lengths=lengths,
        names=_NAMES,
        limits=limits,
        shorter=max(0.0, 1 - longer - same),
        biased=abs(longer + same / 2 - 0.5) > _BIAS,
        sample=report["sample"],
    )
    (folder / "report.html").write_text(html, encoding="utf-8", errors="replace")


def _reason(
    name: str, count: int, by_source: Mapping[str, Any], examples: Sequence[Rejected]
) -> dict[str, Any]:
    shown = [
        {
            "file": item.file.partition(": ")[2] or item.file,
            "line": item.line,
            "advice": item.advice,
            "value": item.start_of_value(),
        }
        for item in examples[:_SHOWN_EXAMPLES]
    ]
    counts = {source: s["reasons"][name] for source, s in by_source.items() if name in s["reasons"]}
    return {
        "title": title(name),
        "count": count,
        "fault": name not in NOT_FAULTY,
        "by_source": counts,
        # not "items", which is a method of every mapping
        "examples": shown,
    }


def _ending(prompt: str) -> str:
    """What a prompt asks: its last words, without the mark of the answer."""
    text = " ".join(prompt.strip().removesuffix("Assistant:").split())
    if len(text) <= _SHOWN_PROMPT_CHARS:
        return text
    text = text[-_SHOWN_PROMPT_CHARS:]
    # a text without spaces, as Chinese is, or one long word
    _, space, rest = text[: len(text) // 2].partition(" ")
    return "… " + (rest + text[len(text) // 2 :] if space else text)


def _percent(share: float) -> str:
    # no line ends between the number and its sign
    return f"{share:.1%}".replace("%", "\N{NO-BREAK SPACE}%")


def _chart(histogram: dict[str, list[int]], name: str, limit: int | None = None) -> Any:
    """A histogram as SVG, with a dashed line at a limit that lies within it."""
    from markupsafe import Markup

    edges, counts = histogram["edges"], histogram["counts"]
    width, top = _WIDTH / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{index * width:.1f}" y="{_BASE - height:.1f}" width="{width - 1:.1f}" '
        f'height="{height:.1f}"><title>{edges[index]} to {edges[index + 1] - 1} tokens: {count}'
        "</title></rect>"
        for index, count in enumerate(counts)
        if (height := _HIGH * count / top)
    )
    mark = ""
    if limit is not None and limit < edges[-1]:
        x = _WIDTH * limit / edges[-1]
        mark = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_BASE}"/>'
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="histogram of the lengths '
        f'of {name}, in tokens">{bars}{mark}'
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{_BASE}" y2="{_BASE}"/>'
        f'<text x="0" y="{_HEIGHT - 4}">{edges[0]}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 4}" text-anchor="middle">tokens</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{edges[-1]:,}</text></svg>'
    )
