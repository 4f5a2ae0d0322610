"""Figures of sampled answers: how long they are, how often they repeat themselves or are empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo.evaluate.bootstrap import Bootstrap, interval
from dpo.modeling.generation import Answer

_N_GRAM = 4


def repetition(ids: Sequence[int], n: int = _N_GRAM) -> float:
    """Share of n-grams that came before: 1 - distinct / all, 0 for a text shorter than n tokens.

    seq-rep-n of Welleck et al. 2019 (arXiv 1908.04319).
    """
    grams = [tuple(ids[first : first + n]) for first in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answer_figures(
    prompts: Sequence[str],
    answers: Mapping[str, tuple[Sequence[Answer], Sequence[str]]],
    *,
    n_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """For each model its figures with intervals, and the policy's length against the SFT model's.

    Args:
        prompts: The prompts, which are resampled.
        answers: By model (``sft``, ``policy``, ``published``): answers and their texts.
        n_bootstrap: How many resamples.
        seed: Of the resampling.
    """
    bootstrap = Bootstrap(prompts, n_bootstrap=n_bootstrap, seed=seed)
    found: dict[str, Any] = {"n_prompts": len(prompts)}
    for name, (given, texts) in answers.items():
        tokens = [item.said for item in given]
        lengths = [len(ids) for ids in tokens]
        shares = {
            "empty": [float(not text.strip()) for text in texts],
            "cut_off": [float(not item.ended) for item in given],
        }
        values = {
            "tokens": [float(length) for length in lengths],
            "repetition": [repetition(ids) for ids in tokens],
        }
        means = bootstrap.means({**values, **shares}, shares=shares)
        found[name] = {key: figure.as_json() for key, figure in means.items()}
        low, median, high = np.percentile(lengths, (5, 50, 95))
        found[name]["tokens_percentiles"] = {"5": low, "50": median, "95": high}
    sft, policy = (
        np.array([float(len(item.said)) for item in answers[name][0]]) for name in ("sft", "policy")
    )
    if sft.sum() > 0:
        ratio = bootstrap.ratios({"growth": (policy, sft)})["growth"]
        found["length_growth"] = interval(*ratio).as_json()
    return found
