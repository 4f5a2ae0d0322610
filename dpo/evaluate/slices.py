"""Reward accuracy and margin by source, by prompt length and by length difference.

Axes: n pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo.evaluate.bootstrap import Array, Bootstrap, Interval, interval, share_interval

_N_PROMPT_BINS = 4
_MUCH_LONGER = 1.5
"""A response with so many times the other's tokens is much longer."""


def slices(
    bootstrap: Bootstrap,
    rewards: Mapping[str, Array],
    *,
    sources: Sequence[str],
    prompt_tokens: Sequence[int],
    chosen_tokens: Array,
    rejected_tokens: Array,
) -> dict[str, Any]:
    """``source``, ``prompt_tokens`` and ``length_difference``: lists of slices, none empty.

    ``length_bias`` is the accuracy where the chosen response is the longer one minus that where the
    rejected one is; None where one of them has no pair.
    """
    lengths = np.asarray(prompt_tokens, dtype=np.float64)
    return {
        "source": _measure(bootstrap, rewards, _by_source(sources)),
        "prompt_tokens": _measure(bootstrap, rewards, _by_quartile(lengths)),
        "length_difference": _measure(
            bootstrap, rewards, _by_difference(chosen_tokens, rejected_tokens)
        ),
        "length_bias": _length_bias(
            bootstrap, rewards["reward_accuracy"], chosen_tokens - rejected_tokens
        ),
    }


def _measure(
    bootstrap: Bootstrap, rewards: Mapping[str, Array], masks: Iterator[tuple[str, Array]]
) -> list[dict[str, Any]]:
    found = []
    for label, mask_n in masks:
        values = {name: rewards[name] for name in ("reward_accuracy", "reward_margin")}
        measured = bootstrap.means(values, mask_n, shares={"reward_accuracy"})
        figures = {name: figure.as_json() for name, figure in measured.items()}
        found.append({"slice": label, "n_pairs": int(mask_n.sum()), **figures})
    return found


def _by_source(sources: Sequence[str]) -> Iterator[tuple[str, Array]]:
    names = np.asarray(sources, dtype=object)
    for name in sorted(set(sources)):
        yield name, (names == name).astype(np.float64)


def _by_quartile(lengths_n: Array) -> Iterator[tuple[str, Array]]:
    """Four bins with about as many pairs each; fewer where many prompts have one length."""
    if not lengths_n.size:
        return
    inner = np.quantile(lengths_n, np.arange(1, _N_PROMPT_BINS) / _N_PROMPT_BINS)
    bin_n = np.searchsorted(np.unique(inner), lengths_n, side="left")
    for number in np.unique(bin_n):
        mask_n = bin_n == number
        low, high = int(lengths_n[mask_n].min()), int(lengths_n[mask_n].max())
        yield f"{low} to {high} tokens" if low < high else f"{low} tokens", mask_n.astype(float)


def _by_difference(chosen_n: Array, rejected_n: Array) -> Iterator[tuple[str, Array]]:
    kinds = (
        ("chosen much longer", chosen_n >= _MUCH_LONGER * rejected_n),
        ("chosen longer", (chosen_n > rejected_n) & (chosen_n < _MUCH_LONGER * rejected_n)),
        ("same length", chosen_n == rejected_n),
        ("rejected longer", (rejected_n > chosen_n) & (rejected_n < _MUCH_LONGER * chosen_n)),
        ("rejected much longer", rejected_n >= _MUCH_LONGER * chosen_n),
    )
    for label, mask_n in kinds:
        if mask_n.any():
            yield label, mask_n.astype(np.float64)


def _length_bias(
    bootstrap: Bootstrap, accurate_n: Array, difference_n: Array
) -> dict[str, float] | None:
    longer_n, shorter_n = (difference_n > 0).astype(float), (difference_n < 0).astype(float)
    if not longer_n.any() or not shorter_n.any():
        return None
    ratios = bootstrap.ratios(
        {
            "longer": (accurate_n * longer_n, longer_n),
            "shorter": (accurate_n * shorter_n, shorter_n),
        }
    )
    value = ratios["longer"][0] - ratios["shorter"][0]
    found = interval(value, ratios["longer"][1] - ratios["shorter"][1])
    if found.low == found.high:
        # both sides agree in themselves: no resample shows how few prompts say so
        longer, shorter = (
            share_interval(*ratios[name], len(set(bootstrap.group_n[mask_n > 0])))
            for name, mask_n in (("longer", longer_n), ("shorter", shorter_n))
        )
        found = Interval(value, longer.low - shorter.high, longer.high - shorter.low)
    return found.as_json()
