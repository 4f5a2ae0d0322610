"""Line and interval charts as inline SVG: no script, no network, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

_WIDTH, _HEIGHT = 560, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 32


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

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    ticks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place(1, y)[1]:.1f}" '
        f'y2="{place(1, y)[1]:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{place(1, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        for y in (low, (low + high) / 2, high)
    )
    base = _HEIGHT - _BOTTOM
    labels = (
        f'<text x="{_LEFT}" y="{base + 16}">1</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{base + 16}" text-anchor="end">{last}</text>'
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{base + 28}" text-anchor="middle">{x_label}</text>'
    )
    summary = f"{title}: from {points[0][1]:.4g} to {points[-1][1]:.4g} in {last} steps"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{summary}">'
        f'{ticks}{labels}<polyline class="curve" points="{path}"/></svg>'
    )


def interval_bar(value: float, low: float, high: float, chance: float = 0.5) -> str:
    """A share between 0 and 1 with its interval, beside the mark of chance."""
    return (
        '<svg class="bar" viewBox="0 0 200 24" role="img" '
        f'aria-label="{value:.3f}, 95 % interval {low:.3f} to {high:.3f}, chance {chance}">'
        '<line class="grid" x1="0" x2="200" y1="12" y2="12"/>'
        f'<line class="chance" x1="{200 * chance:.1f}" x2="{200 * chance:.1f}" y1="2" y2="22"/>'
        f'<line class="range" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="12" y2="12"/>'
        f'<circle class="dot" cx="{200 * value:.1f}" cy="12" r="5"/></svg>'
    )
