"""How long the texts of a sample are, in tokens, and what the limits do to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo.data.tokenize import Limits

_PERCENTILES = (5, 50, 95, 99, 100)
_BINS = 24
_SUGGESTED_SHARE = 0.99
_SUGGESTED_MULTIPLE = 32

Counts = npt.NDArray[np.int64]


def length_figures(
    sample: Sequence[dict[str, Any]],
    count: Callable[[Sequence[str]], Sequence[int]],
    limits: Limits,
) -> dict[str, Any]:
    """Figures for the report; JSON values.

    Args:
        sample: Pair rows.
        count: Tokens of each text, as the model's tokenizer counts.
        limits: Longest lengths, in tokens.
    """
    # the end-of-sequence token follows each response
    counts = {
        name: np.array(count([row[name] for row in sample])) + extra
        for name, extra in (("prompt", 0), ("chosen", 1), ("rejected", 1))
    }
    whole = counts["prompt"] + np.maximum(counts["chosen"], counts["rejected"])
    suggested = int(np.quantile(whole, _SUGGESTED_SHARE, method="inverted_cdf"))
    return {
        "sample_pairs": len(sample),
        "percentiles": {
            name: {str(p): int(np.percentile(values, p)) for p in _PERCENTILES}
            for name, values in counts.items()
        },
        "histograms": {name: _histogram(values) for name, values in counts.items()},
        **_truncated(counts, whole, limits),
        "suggested_max_length": -(-suggested // _SUGGESTED_MULTIPLE) * _SUGGESTED_MULTIPLE,
        "chosen_longer_share": float(np.mean(counts["chosen"] > counts["rejected"])),
        "same_length_share": float(np.mean(counts["chosen"] == counts["rejected"])),
    }


def _truncated(counts: dict[str, Counts], whole: Counts, limits: Limits) -> dict[str, float]:
    """Shares of the pairs that ``tokenize.tokenize_pair`` cuts."""
    too_long = whole > limits.max_length
    prompt = np.where(too_long, np.minimum(counts["prompt"], limits.max_prompt_length), 0)
    responses = whole - counts["prompt"]
    room = limits.max_length - limits.max_prompt_length
    cut = too_long & (prompt + responses > limits.max_length) & (responses > room)
    return {
        "truncated_prompt_share": float(
            np.mean(too_long & (counts["prompt"] > limits.max_prompt_length))
        ),
        "truncated_response_share": float(np.mean(cut)),
    }


def _histogram(values: Counts) -> dict[str, list[int]]:
    """Counts in equal bins up to the longest; ``edges`` has one more entry than ``counts``."""
    width = max(1, -(-int(values.max()) // _BINS))
    edges = np.arange(0, (int(values.max()) // width + 2) * width, width)
    counts, _ = np.histogram(values, edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
