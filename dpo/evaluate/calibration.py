"""How well the implicit reward tells chosen from rejected responses, and how sure it should be.

*ROC*: every response is scored with its reward; chosen responses are the positives. The area under
the curve is the chance that a random chosen response has a larger reward than a random rejected
one, ties counting half (Fawcett 2006, "An introduction to ROC analysis").

*Reliability*: under the Bradley-Terry model a margin m says that the chosen response is preferred
with probability sigmoid(m). Each pair has a confidence sigmoid(|m|) and is right where m > 0 (a
margin of 0 is right half the time); in bins of confidence, the share of right pairs is compared
with the mean confidence. The expected calibration error is their mean distance, weighted by pairs
(Guo et al. 2017, arXiv 1706.04599).

Axes: n pairs, r = 2n responses, K bins, B resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo.evaluate.bootstrap import Array, Bootstrap, interval, share_interval

_N_BINS = 10
_MAX_ROC_POINTS = 100


def calibration(bootstrap: Bootstrap, chosen_n: Array, rejected_n: Array) -> dict[str, Any]:
    """ROC with its area, confusion at the median reward, reliability with its error."""
    return {
        "auc": _auc(bootstrap, chosen_n, rejected_n),
        "roc": roc(chosen_n, rejected_n),
        "confusion": confusion(chosen_n, rejected_n),
        **_reliability(bootstrap, chosen_n - rejected_n),
    }


def roc(chosen_n: Array, rejected_n: Array) -> list[dict[str, float]]:
    """Points of the curve from (0, 0) to (1, 1), at most about a hundred, by falling threshold.

    A response counts as chosen when its reward is at least the threshold; the first point has no
    threshold.
    """
    thresholds = np.unique(np.concatenate([chosen_n, rejected_n]))[::-1]
    if len(thresholds) > _MAX_ROC_POINTS:
        kept = np.linspace(0, len(thresholds) - 1, _MAX_ROC_POINTS).round().astype(int)
        thresholds = thresholds[kept]
    true = _share_at_least(chosen_n, thresholds)
    false = _share_at_least(rejected_n, thresholds)
    points = [{"false_positive_rate": 0.0, "true_positive_rate": 0.0}]
    return points + [
        {"false_positive_rate": float(x), "true_positive_rate": float(y), "threshold": float(t)}
        for x, y, t in zip(false, true, thresholds, strict=True)
    ]


def _share_at_least(values_n: Array, thresholds: Array) -> Array:
    below = np.searchsorted(np.sort(values_n), thresholds, side="left")
    share: Array = 1 - below / len(values_n)
    return share


def confusion(chosen_n: Array, rejected_n: Array) -> dict[str, Any]:
    """Responses by what people called them (rows) and by their reward (columns).

    The threshold is the median reward: as many responses are called chosen as there are.
    """
    threshold = float(np.median(np.concatenate([chosen_n, rejected_n])))
    rows = []
    for values_n in (chosen_n, rejected_n):
        n_above = int((values_n > threshold).sum())
        rows.append([n_above, len(values_n) - n_above])
    return {"categories": ["chosen", "rejected"], "matrix": rows, "threshold": threshold}


def _auc(bootstrap: Bootstrap, chosen_n: Array, rejected_n: Array) -> dict[str, float]:
    scores_r = np.concatenate([chosen_n, rejected_n])
    _, rank_r = np.unique(scores_r, return_inverse=True)
    n_ranks = int(rank_r.max()) + 1
    n = len(chosen_n)

    def area(weights_Bn: Array) -> Array:
        areas = np.empty(len(weights_Bn))
        for number, weight_n in enumerate(weights_Bn):
            chosen = np.bincount(rank_r[:n], weights=weight_n, minlength=n_ranks)
            rejected = np.bincount(rank_r[n:], weights=weight_n, minlength=n_ranks)
            below = np.cumsum(rejected) - rejected
            areas[number] = (chosen * (below + rejected / 2)).sum() / weight_n.sum() ** 2
        return areas

    draws = [area(chunk[:, bootstrap.group_n].astype(float)) for chunk in bootstrap.weights()]
    return interval(float(area(np.ones((1, n)))[0]), np.concatenate(draws)).as_json()


def _reliability(bootstrap: Bootstrap, margin_n: Array) -> dict[str, Any]:
    confidence_n = 1 / (1 + np.exp(-np.abs(margin_n)))
    right_n = np.where(margin_n == 0, 0.5, (margin_n > 0).astype(float))
    # confidences lie between 0.5 and 1
    bin_n = np.minimum(((confidence_n - 0.5) * 2 * _N_BINS).astype(int), _N_BINS - 1)
    used = np.unique(bin_n)
    masks = [(bin_n == number).astype(float) for number in used]
    columns = {
        f"{name}{number}": (values_n * mask_n, mask_n)
        for number, mask_n in zip(used, masks, strict=True)
        for name, values_n in (("right", right_n), ("confidence", confidence_n))
    }
    ratios = bootstrap.ratios(columns)
    sums_BK = bootstrap.sums(np.stack([*masks, np.ones_like(margin_n)], axis=1))
    shares_BK = sums_BK[:, :-1] / sums_BK[:, -1:]
    error, error_B = 0.0, np.zeros(bootstrap.n_bootstrap)
    bins = []
    for position, number in enumerate(used):
        right, right_B = ratios[f"right{number}"]
        confidence, confidence_B = ratios[f"confidence{number}"]
        error += masks[position].mean() * abs(right - confidence)
        n_prompts = len(set(bootstrap.group_n[bin_n == number]))
        # a bin without a pair in a resample has no weight there
        error_B += shares_BK[:, position] * np.nan_to_num(np.abs(right_B - confidence_B))
        bins.append(
            {
                "from": 0.5 + number / 2 / _N_BINS,
                "n_pairs": int(masks[position].sum()),
                "confidence": confidence,
                "accuracy": share_interval(right, right_B, n_prompts).as_json(),
            }
        )
    return {"reliability": bins, "ece": interval(error, error_B).as_json()}
