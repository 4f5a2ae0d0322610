"""Confidence intervals by resampling prompts.

Several pairs may share a prompt and are then not independent, so prompts are drawn, not pairs
(the cluster bootstrap; Efron and Tibshirani 1993, chapter 8).

Axes: n pairs, G prompts, B resamples, F columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_LEVELS = (2.5, 97.5)
_ALPHA = 0.05
_CHUNK_CELLS = 20_000_000
"""Resamples are drawn in pieces of so many counts, so that memory does not grow with them."""


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval (percentile method)."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high}


def interval(value: float, draws_B: Array) -> Interval:
    """``value`` with the interval of its resampled values; those that are not finite are left out.

    A resample can hold no pair of a small slice: its ratio is then undefined.
    """
    finite = draws_B[np.isfinite(draws_B)]
    if not finite.size:
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.percentile(finite, _LEVELS)
    return Interval(float(value), float(low), float(high))


def share_interval(value: float, draws_B: Array, n_prompts: int) -> Interval:
    """A share of prompts with its interval, also where the prompts all agree.

    Every resample of prompts that are all right is all right, so the bootstrap would take 2 right
    answers of 2 for certainty. The share of prompts that are as these n is 0.05^(1/n) or more: with
    a smaller one, n alike are drawn in less than 5 % of cases (the exact one-sided bound of Clopper
    and Pearson 1934). The others may be all wrong or all right.
    """
    found = interval(value, draws_B)
    if found.low != found.high or not n_prompts:
        return found
    agreeing = _ALPHA ** (1 / n_prompts)
    # exactly 1 where all are right
    high = 1 - agreeing * (1 - found.value)
    return Interval(found.value, agreeing * found.value, high)


class Bootstrap:
    """Resamples of the prompts behind n pairs; every figure sees the same ones."""

    def __init__(self, groups: Sequence[str], *, n_bootstrap: int, seed: int) -> None:
        """``groups`` is the prompt of each pair, ``n_bootstrap`` the number of resamples."""
        # sorted: the same resamples whatever the order of the pairs; not as an array of texts,
        # which would give each of them the width of the longest
        numbers = {text: number for number, text in enumerate(sorted(set(groups)))}
        self.group_n = np.array([numbers[text] for text in groups])
        self.n_groups = len(numbers)
        self.n_bootstrap = n_bootstrap
        self.seed = seed

    def weights(self) -> Iterator[npt.NDArray[np.int64]]:
        """How often each prompt is drawn, [some of B, G], until all B resamples are out."""
        generator = np.random.default_rng(self.seed)
        chances = np.full(self.n_groups, 1 / self.n_groups)
        step = max(1, _CHUNK_CELLS // self.n_groups)
        for first in range(0, self.n_bootstrap, step):
            size = min(step, self.n_bootstrap - first)
            yield generator.multinomial(self.n_groups, chances, size=size)

    def sums(self, columns_nF: Array) -> Array:
        """Sum of each column in each resample, [B, F]."""
        sums_GF = np.zeros((self.n_groups, columns_nF.shape[1]))
        np.add.at(sums_GF, self.group_n, columns_nF)
        return np.concatenate([weights_BG @ sums_GF for weights_BG in self.weights()])

    def ratios(self, columns: Mapping[str, tuple[Array, Array]]) -> dict[str, tuple[float, Array]]:
        """Of each (numerator [n], denominator [n]): ratio of sums, and [B] resampled ratios."""
        stacked = [part for pair in columns.values() for part in pair]
        if not stacked:
            return {}
        columns_nF = np.stack(stacked, axis=1)
        sums_BF, whole_F = self.sums(columns_nF), columns_nF.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            values_F = whole_F[0::2] / whole_F[1::2]
            draws_BF = sums_BF[:, 0::2] / sums_BF[:, 1::2]
        return {
            name: (float(values_F[number]), draws_BF[:, number])
            for number, name in enumerate(columns)
        }

    def means(
        self,
        values: Mapping[str, Sequence[float] | Array],
        mask_n: Array | None = None,
        *,
        shares: Collection[str] = (),
    ) -> dict[str, Interval]:
        """Mean and interval of each figure, over the pairs where ``mask_n`` is 1.

        Those named in ``shares`` are between 0 and 1 and count what is so (``share_interval``).
        """
        ones_n = np.ones(len(self.group_n)) if mask_n is None else mask_n
        n_prompts = self.n_groups if mask_n is None else len(set(self.group_n[mask_n > 0]))
        columns = {
            name: (np.asarray(value, dtype=np.float64) * ones_n, ones_n)
            for name, value in values.items()
        }
        return {
            name: share_interval(*found, n_prompts) if name in shares else interval(*found)
            for name, found in self.ratios(columns).items()
        }

    def shares(
        self, values: Mapping[str, Sequence[float] | Array], mask_n: Array | None = None
    ) -> dict[str, Interval]:
        """As ``means``, of shares alone."""
        return self.means(values, mask_n, shares=values.keys())


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
    return Bootstrap(groups, n_bootstrap=n_bootstrap, seed=seed).means(values)
