"""Win rates of the scores that a judge gave, as they are and at equal length.

The length-controlled win rate is the one that a logistic regression of the scores on the difference
in length predicts for answers of equal length (Dubois et al. 2024, arXiv 2404.04475, without its
term for the difficulty of a prompt).

Axes: n pairs of answers, B resamples, G prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo.evaluate.bootstrap import Array, Bootstrap, interval

_NEWTON_STEPS = 25
_RIDGE = 1e-2
"""Weight of the squared coefficients, so that scores that are all alike give a finite fit."""


def win_rates(
    prompts: Sequence[str],
    scores: Sequence[tuple[float, float]],
    extra_tokens: Sequence[int],
    *,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Win rates and shares, each with its interval.

    Args:
        prompts: Of each pair of answers; they are what is resampled.
        scores: The policy's score in either order of the answers: 1, 1/2 or 0.
        extra_tokens: How much longer the policy's answer is.
        n_bootstrap: How many resamples.
        seed: Of the resampling.
    """
    both = np.asarray(scores, dtype=np.float64)
    score_n = both.mean(axis=1)
    bootstrap = Bootstrap(prompts, n_bootstrap=n_bootstrap, seed=seed)
    means = bootstrap.shares(
        {
            "win_rate": score_n,
            "wins": (score_n > 0.5).astype(float),
            "ties": (score_n == 0.5).astype(float),
            "losses": (score_n < 0.5).astype(float),
            "position_changed": (both[:, 0] != both[:, 1]).astype(float),
        }
    )
    found: dict[str, Any] = {name: figure.as_json() for name, figure in means.items()}
    extra_n = np.asarray(extra_tokens, dtype=np.float64)
    spread = float(extra_n.std())
    length_n = np.tanh(extra_n / spread) if spread else np.zeros_like(extra_n)
    value = float(length_controlled(score_n, length_n, np.ones((1, len(score_n))))[0])
    draws = [
        length_controlled(score_n, length_n, weights_BG[:, bootstrap.group_n].astype(float))
        for weights_BG in bootstrap.weights()
    ]
    found["win_rate_length_controlled"] = interval(value, np.concatenate(draws)).as_json()
    return found


def length_controlled(score_n: Array, length_n: Array, weights_Bn: Array) -> Array:
    """Predicted score at length 0 of a weighted logistic regression, for each row of weights.

    Newton's method on sum w (s log p + (1 - s) log(1 - p)) - ridge (a^2 + b^2) / 2 with
    p = sigmoid(a + b length); shape [B].
    """
    a_B = np.zeros(len(weights_Bn))
    b_B = np.zeros(len(weights_Bn))
    for _ in range(_NEWTON_STEPS):
        p_Bn = 1 / (1 + np.exp(-(a_B[:, None] + b_B[:, None] * length_n)))
        error_Bn = weights_Bn * (score_n - p_Bn)
        curve_Bn = weights_Bn * p_Bn * (1 - p_Bn)
        gradient_a_B = error_Bn.sum(1) - _RIDGE * a_B
        gradient_b_B = error_Bn @ length_n - _RIDGE * b_B
        aa_B, ab_B = curve_Bn.sum(1) + _RIDGE, curve_Bn @ length_n
        bb_B = curve_Bn @ length_n**2 + _RIDGE
        determinant_B = aa_B * bb_B - ab_B**2
        step_a_B = (bb_B * gradient_a_B - ab_B * gradient_b_B) / determinant_B
        step_b_B = (aa_B * gradient_b_B - ab_B * gradient_a_B) / determinant_B
        # far from the maximum a whole step can overshoot
        scale_B = np.minimum(1, 2 / np.maximum(1e-12, np.abs(step_a_B) + np.abs(step_b_B)))
        a_B, b_B = a_B + scale_B * step_a_B, b_B + scale_B * step_b_B
    return 1 / (1 + np.exp(-a_B))
