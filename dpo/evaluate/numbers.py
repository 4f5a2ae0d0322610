"""Figures, and as text, the same in every form of the report: with the decimals that it takes.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WITHIN = "within evaluation.max_new_tokens or the model's context"
"""Where answers end that do not end by themselves."""
NONE = "–"
"""Stands where there is no figure."""
_MOST_DECIMALS = 8


def finite(values: Mapping[str, Any], *keys: str) -> float | None:
    """A finite number at a path of keys, else None."""
    found: Any = values
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    good = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if good else None


def interval_text(figure: Mapping[str, float] | None, digits: int | None = None) -> str:
    """A figure with its interval; a dash where there is none."""
    if figure is None:
        return NONE
    parts = [figure[key] for key in ("value", "low", "high")]
    if digits is None:
        digits = _decimals(parts)
    value, low, high = (number_text(part, digits) for part in parts)
    return f"{value} [{low}, {high}]"


def percent_text(figure: Mapping[str, float] | None) -> str:
    """A share as per cent with its interval."""
    if figure is None:
        return NONE
    value, low, high = (f"{100 * figure[key]:.0f}" for key in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def share_text(share: float) -> str:
    """A share as per cent; some are not none, and not all."""
    if 0 < share < 0.01:
        return "fewer than 1 %"
    if 0.99 < share < 1:
        return "more than 99 %"
    return f"{100 * share:.0f} %"


def signed_text(value: float) -> str:
    """A difference with its sign."""
    return number_text(value, _decimals([value]), sign="+")


def number_text(value: float, digits: int, sign: str = "") -> str:
    """A number with so many decimals; what rounds to 0 has no sign."""
    shown = f"{value:{sign}.{digits}f}"
    return (shown if float(shown) else f"{0:.{digits}f}").replace("-", "−")


def _decimals(values: list[float]) -> int:
    """Fewer for large numbers; for small ones enough that two digits of the largest are seen."""
    size = abs(values[0])
    if size >= 10:
        return 0 if size >= 1000 else 1 if size >= 100 else 2
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if not 0 < largest < 0.01:
        return 3
    return min(_MOST_DECIMALS, 1 - math.floor(math.log10(largest)))
