"""Charts as inline SVG: no script, no network, readable in light and dark and by a screen reader.

Every text that goes in is a number or escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import escape

from dpo.evaluate.bounds import shortened

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 36
_SQUARE = 260
_MAX_POINTS = 300
_ROW = 34
_LONGEST_NAME = 40


def line_chart(title: str, values: Sequence[float], x_label: str = "optimiser step") -> str:
    """A curve over steps, from 1; an empty text where there is nothing to draw."""
    points = [(x, y) for x, y in enumerate(values, 1) if math.isfinite(y)]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    if low == high:
        low, high = low - 0.5, high + 0.5
    last = points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - 1) / max(1, last - 1) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return across, down

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _thinned(points)))
    ticks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place(1, y)[1]:.1f}" '
        f'y2="{place(1, y)[1]:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{place(1, y)[1] + 4:.1f}" text-anchor="end">{_tick(y)}</text>'
        for y in (low, (low + high) / 2, high)
    )
    base = _HEIGHT - _BOTTOM
    labels = (
        f'<text x="{_LEFT}" y="{base + 16}">1</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base + 16}" text-anchor="end">{last}</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{base + 30}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    summary = f"{title}: from {points[0][1]:.4g} to {points[-1][1]:.4g} in {last} steps"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(summary)}">'
        f'{ticks}{labels}<polyline class="curve" points="{path}"/></svg>'
    )


def _tick(value: float) -> str:
    """A number beside an axis, of at most seven characters: what is longer is cut off there."""
    size = abs(value)
    if size >= 100_000 or 0 < size < 0.01:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.0f}" if size >= 1000 else f"{value:.3g}"


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most ``_MAX_POINTS`` points: means of neighbours, the first and last kept."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = -(-len(points) // _MAX_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means[1:-1], points[-1]]


def interval_bar(figure: Mapping[str, float], chance: float = 0.5) -> str:
    """A share between 0 and 1 with its interval, beside the mark of chance."""
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    return (
        '<svg class="bar" viewBox="0 0 200 24" role="img" '
        f'aria-label="{value:.3f}, 95 % interval {low:.3f} to {high:.3f}, chance {chance}">'
        '<line class="grid" x1="0" x2="200" y1="12" y2="12"/>'
        f'<line class="chance" x1="{200 * chance:.1f}" x2="{200 * chance:.1f}" y1="2" y2="22"/>'
        f'<line class="range" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="12" y2="12"/>'
        f'<circle class="dot" cx="{200 * value:.1f}" cy="12" r="5"/></svg>'
    )


def _square(title: str, inner: str, x_label: str, y_label: str, low: float) -> str:
    """Axes from ``low`` to 1 both ways with the diagonal, and ``inner`` drawn over them."""
    left, top, size = 46, 10, _SQUARE - 46 - 12
    base = top + size
    middle = (low + 1) / 2
    ticks = "".join(
        f'<text x="{left - 5}" y="{base - (v - low) / (1 - low) * size + 4:.1f}" '
        f'text-anchor="end">{v:.3g}</text>'
        f'<text x="{left + (v - low) / (1 - low) * size:.1f}" y="{base + 15}" '
        f'text-anchor="{anchor}">{v:.3g}</text>'
        for v, anchor in ((low, "start"), (middle, "middle"), (1.0, "end"))
    )
    return (
        f'<svg class="square" viewBox="0 0 {_SQUARE} {base + 38}" role="img" '
        f'aria-label="{escape(title)}">'
        f'<rect class="frame" x="{left}" y="{top}" width="{size}" height="{size}"/>'
        f'<line class="chance" x1="{left}" y1="{base}" x2="{left + size}" y2="{top}"/>{ticks}'
        f'<text x="{left + size / 2}" y="{base + 32}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(12 {top + size / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
        f'<g transform="translate({left} {base}) scale({size / (1 - low):.4f} '
        f'{-size / (1 - low):.4f}) translate({-low} {-low})">{inner}</g></svg>'
    )


def roc_chart(points: Sequence[Mapping[str, float]], auc: Mapping[str, float]) -> str:
    """The ROC curve of the implicit reward."""
    path = " ".join(f"{p['false_positive_rate']:.4f},{p['true_positive_rate']:.4f}" for p in points)
    title = f"ROC curve, area {auc['value']:.3f}, 95 % from {auc['low']:.3f} to {auc['high']:.3f}"
    inner = f'<polyline class="curve thin" points="{path}"/>'
    return _square(title, inner, "rejected called chosen", "chosen called chosen", 0.0)


def reliability_chart(bins: Sequence[Mapping[str, Any]], ece: Mapping[str, float]) -> str:
    """Accuracy by confidence, with intervals; on the diagonal confidence is what it says."""
    marks = []
    for item in bins:
        x, accuracy = item["confidence"], item["accuracy"]
        low, high = max(0.0, accuracy["low"]), accuracy["high"]
        marks.append(
            f'<line class="range thin" x1="{x:.4f}" x2="{x:.4f}" y1="{low:.4f}" y2="{high:.4f}"/>'
            f'<circle class="dot" cx="{x:.4f}" cy="{accuracy["value"]:.4f}" r="0.014"/>'
        )
    title = (
        f"accuracy by confidence in {len(bins)} bins, expected calibration error {ece['value']:.3f}"
    )
    return _square(title, "".join(marks), "confidence", "share of pairs right", 0.0)


def interval_rows(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, title: str, chance: float | None
) -> str:
    """Named figures with their intervals below each other on one scale."""
    if not rows:
        return ""
    bounds = [bound for _, figure in rows for bound in (figure["low"], figure["high"])]
    bounds += [chance] if chance is not None else []
    finite = [bound for bound in bounds if math.isfinite(bound)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    pad = (high - low) * 0.08 or 0.5
    share = chance is not None
    low, high = max(0.0, low - pad) if share else low - pad, high + pad
    high = min(1.0, high) if share else high
    width, height = 320, _ROW * len(rows) + 26

    def across(value: float) -> float:
        return 8 + (value - low) / (high - low) * (width - 16)

    parts = []
    for number, (name, figure) in enumerate(rows):
        y = _ROW * number + 24
        shown = f"{figure['value']:.3f}"
        parts.append(
            f'<text class="name" x="8" y="{y - 10}">{escape(shortened(name, _LONGEST_NAME))}</text>'
            f'<text class="name" x="{width - 8}" y="{y - 10}" text-anchor="end">{shown}</text>'
            f'<line class="grid" x1="8" x2="{width - 8}" y1="{y}" y2="{y}"/>'
            f'<line class="range" x1="{across(figure["low"]):.1f}" '
            f'x2="{across(figure["high"]):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{across(figure["value"]):.1f}" cy="{y}" r="5"/>'
        )
        if chance is not None:
            x = across(chance)
            parts.append(
                f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5}" y2="{y + 5}"/>'
            )
    scale = (
        f'<text x="8" y="{height - 4}">{low:.3g}</text>'
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">{high:.3g}</text>'
    )
    return (
        f'<svg class="rows" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}{scale}</svg>'
    )


def trade_off(points: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]]) -> str:
    """Reward accuracy (upwards) against KL divergence (to the right) of several runs.

    Args:
        points: Label, divergence and accuracy of each run, both with intervals.
    """
    xs = [bound for _, kl, _ in points for bound in (kl["low"], kl["high"])]
    ys = [bound for _, _, accuracy in points for bound in (accuracy["low"], accuracy["high"])]
    # narrow, so that its letters are those of a page on a phone too
    width, height, left, bottom, top = 360, 270, 62, 42, 12
    x_low, x_high = _padded(xs)
    y_low, y_high = _padded(ys)
    x_low = max(0.0, x_low)

    def across(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - 16)

    def down(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    base = height - bottom
    marks = "".join(
        f"<g><title>{escape(label)}: accuracy {a['value']:.3f}, KL {kl['value']:.3f}</title>"
        f'<line class="range thin" x1="{across(kl["low"]):.1f}" x2="{across(kl["high"]):.1f}" '
        f'y1="{down(a["value"]):.1f}" y2="{down(a["value"]):.1f}"/>'
        f'<line class="range thin" x1="{across(kl["value"]):.1f}" x2="{across(kl["value"]):.1f}" '
        f'y1="{down(a["low"]):.1f}" y2="{down(a["high"]):.1f}"/>'
        f'<circle class="dot" cx="{across(kl["value"]):.1f}" cy="{down(a["value"]):.1f}" r="9"/>'
        f'<text class="number" x="{across(kl["value"]):.1f}" y="{down(a["value"]) + 4:.1f}" '
        f'text-anchor="middle">{number}</text></g>'
        for number, (label, kl, a) in enumerate(points, 1)
    )
    ticks = "".join(
        f'<text x="{left - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:.3f}</text>'
        f'<line class="grid" x1="{left}" x2="{width - 16}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        f'<text x="{across(x):.1f}" y="{base + 16}" text-anchor="{anchor}">{x:.3g}</text>'
        for x, y, anchor in (
            (x_low, y_low, "start"),
            ((x_low + x_high) / 2, (y_low + y_high) / 2, "middle"),
            (x_high, y_high, "end"),
        )
    )
    title = "reward accuracy against KL divergence: " + "; ".join(
        f"{label}: {a['value']:.3f} at {kl['value']:.3f}" for label, kl, a in points
    )
    return (
        f'<svg class="trade" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{ticks}'
        f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">KL divergence from '
        f"the SFT model, nats an answer</text>"
        f'<text transform="translate(14 {(top + base) / 2}) rotate(-90)" text-anchor="middle">'
        f"reward accuracy</text>{marks}</svg>"
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    pad = (high - low) * 0.08 or 0.05
    return low - pad, high + pad
