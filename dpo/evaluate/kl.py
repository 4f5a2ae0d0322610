"""How far the policy has moved from the SFT model: KL divergence on the policy's own samples.

Each prompt is answered by the policy at temperature 1 without nucleus, and the answer is scored by
both models with the kernels of training. With d = log-prob(SFT) - log-prob(policy) of a token, the
divergence of an answer's first tokens is the expectation of either

    k3:  sum of exp(d) - 1 - d      never negative, lower variance: the figure that the gate takes
    k1:  sum of -d

(Schulman 2020, "Approximating KL Divergence"; both are unbiased for each token given the tokens
before it, so their sums are for the answer). Answers are cut at ``max_new_tokens``: what lies
beyond is not measured. In nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo.evaluate.bootstrap import Bootstrap, interval

_MOST_NATS = 600.0
"""Of a token, so that a broken policy's divergence is huge and still a number."""

Values = npt.NDArray[np.float32]


def kl_figures(
    prompts: Sequence[str],
    policy: Sequence[Values],
    reference: Sequence[Values],
    *,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """``per_answer`` and ``per_token`` by k3, and ``k1`` an answer, each with its interval.

    Args:
        prompts: The prompt of each answer; they are what is resampled.
        policy: Log-probability of each token of each answer under the policy that sampled it.
        reference: The same under the SFT model.
        n_bootstrap: How many resamples.
        seed: Of the resampling.
    """
    differences = [
        np.minimum(theirs.astype(np.float64) - ours.astype(np.float64), _MOST_NATS)
        for ours, theirs in zip(policy, reference, strict=True)
    ]
    k3_n = np.array([(np.expm1(d) - d).sum() for d in differences])
    k1_n = np.array([-d.sum() for d in differences])
    tokens_n = np.array([float(len(d)) for d in differences])
    bootstrap = Bootstrap(prompts, n_bootstrap=n_bootstrap, seed=seed)
    ones_n = np.ones_like(k3_n)
    ratios = bootstrap.ratios(
        {"per_answer": (k3_n, ones_n), "per_token": (k3_n, tokens_n), "k1": (k1_n, ones_n)}
    )
    found = {name: interval(*ratio).as_json() for name, ratio in ratios.items()}
    return {"n_answers": len(prompts), "mean_tokens": float(tokens_n.mean()), **found}
