"""Confidence intervals by resampling prompts.

Several pairs may share a prompt and are then not independent, so prompts are drawn, not pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval (percentile method)."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def intervals(
    values: Mapping[str, Sequence[float]], groups: Sequence[str], *, n_bootstrap: int, seed: int
) -> dict[str, Interval]:
    """Mean and interval of each figure; all figures share the same resamples.

    Args:
        values: By name, one value for each of n pairs.
        groups: The prompt of each pair.
        n_bootstrap: How many resamples.
        seed: Of the resampling.
    """
    _, group_n = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    n_groups = int(group_n.max()) + 1
    generator = np.random.default_rng(seed)
    # how often each prompt is drawn in each resample
    weights_BG = generator.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_bootstrap)
    counts_G = np.bincount(group_n, minlength=n_groups)
    sizes_B = weights_BG @ counts_G
    found = {}
    for name, sequence in values.items():
        value_n: npt.NDArray[np.float64] = np.asarray(sequence, dtype=np.float64)
        sums_G = np.bincount(group_n, weights=value_n, minlength=n_groups)
        low, high = np.percentile(weights_BG @ sums_G / sizes_B, _LEVELS)
        found[name] = Interval(float(value_n.mean()), float(low), float(high))
    return found
