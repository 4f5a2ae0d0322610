"""The data report: what was accepted, what was rejected and why, how long the texts are.

``report.json`` and ``report.html``; the page needs no network and no script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.data.lengths import length_figures
from dpo.data.quarantine import Rejected
from dpo.data.tokenize import Limits

SAMPLE_ROWS = 1000
"""Pairs whose lengths are measured."""
_SHOWN_ROWS = 8
_BIAS = 0.1
_WIDTH, _HEIGHT, _BASE = 320, 120, 100


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

    lengths = length_figures(sample, tokenizer, limits)
    report = {
        **report,
        "lengths_tokens": lengths,
        "examples": {reason: [str(item) for item in items] for reason, items in examples.items()},
        "sample": sample[:: max(1, len(sample) // _SHOWN_ROWS)][:_SHOWN_ROWS],
    }
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(autoescape=True, loader=loader)
    environment.filters |= {"count": "{:,}".format, "percent": _percent, "chart": _chart}
    longer, same = lengths["chosen_longer_share"], lengths["same_length_share"]
    html = environment.get_template("data_report.html.j2").render(
        f=report["figures"],
        sources=report["sources"],
        near=report["near_duplicates"],
        examples={reason: items[0] for reason, items in report["examples"].items()},
        lengths=lengths,
        limits=limits,
        biased=abs(longer + same / 2 - 0.5) > _BIAS,
        sample=report["sample"],
    )
    (folder / "report.html").write_text(html, encoding="utf-8", errors="replace")


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def _chart(histogram: dict[str, list[int]], name: str) -> Any:
    """A histogram as SVG."""
    from markupsafe import Markup

    edges, counts = histogram["edges"], histogram["counts"]
    width = _WIDTH / len(counts)
    bars = "".join(
        f'<rect x="{index * width:.1f}" y="{_BASE - height:.1f}" width="{width - 1:.1f}" '
        f'height="{height:.1f}"><title>{edges[index]} to {edges[index + 1] - 1} tokens: {count}'
        "</title></rect>"
        for index, count in enumerate(counts)
        if (height := _BASE * count / max(counts))
    )
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="histogram of the lengths '
        f'of {name}, in tokens">{bars}<text x="0" y="{_HEIGHT - 4}">{edges[0]}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{edges[-1]}</text></svg>'
    )
