"""Figures on held-out pairs: the SFT model (the reference) before, the policy after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.evaluate.bootstrap import intervals
from dpo.modeling.losses import PairLogps, preference_loss, uses_means


@dataclass(frozen=True)
class HeldOut:
    """Log-probabilities of the same pairs under both models, and the prompt of each pair."""

    prompts: Sequence[str]
    before: Sequence[PairLogProbs]
    after: Sequence[PairLogProbs]


def figures(held_out: HeldOut, config: RunConfig) -> dict[str, Any]:
    """Everything that is measured on held-out pairs, each with its interval.

    ``accuracy_sum`` is the share of pairs where the chosen response has the larger log-probability,
    ``accuracy_per_token`` the same for the mean over its tokens; ``reward_accuracy`` compares the
    rewards, beta times the log-ratio to the reference, strictly.
    """
    before, after = _model(held_out.before), _model(held_out.after)
    preference = _preference(held_out, config)
    names = {f"before.{name}": values for name, values in before.items()}
    names |= {f"after.{name}": values for name, values in {**after, **preference}.items()}
    measured = intervals(
        names,
        held_out.prompts,
        n_bootstrap=config.evaluation.n_bootstrap,
        seed=config.seed,
    )
    result: dict[str, Any] = {"n_pairs": len(held_out.prompts), "chance": 0.5}
    for side in ("before", "after"):
        result[side] = {
            name.partition(".")[2]: interval.as_json()
            for name, interval in measured.items()
            if name.startswith(f"{side}.")
        }
    return result


def _sums(rows: Sequence[PairLogProbs], side: str) -> list[float]:
    return [float(getattr(row, side).sum(dtype=np.float64)) for row in rows]


def _means(rows: Sequence[PairLogProbs], side: str) -> list[float]:
    return [float(getattr(row, side).mean(dtype=np.float64)) for row in rows]


def _greater(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [float(a > b) for a, b in zip(left, right, strict=True)]


def _model(rows: Sequence[PairLogProbs]) -> dict[str, list[float]]:
    chosen, rejected = _sums(rows, "chosen"), _sums(rows, "rejected")
    chosen_mean, rejected_mean = _means(rows, "chosen"), _means(rows, "rejected")
    return {
        "accuracy_sum": _greater(chosen, rejected),
        "accuracy_per_token": _greater(chosen_mean, rejected_mean),
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_nll_per_token": [-value for value in chosen_mean],
    }


def _preference(held_out: HeldOut, config: RunConfig) -> dict[str, list[float]]:
    assert not isinstance(config.loss, SFTLoss)
    sums = (
        torch.tensor(_sums(rows, side), dtype=torch.float64)
        for rows in (held_out.after, held_out.before)
        for side in ("chosen", "rejected")
    )
    lengths = (
        torch.tensor([len(getattr(row, side)) for row in held_out.after], dtype=torch.float64)
        for side in ("chosen", "rejected")
    )
    logps = PairLogps(*sums, *lengths)
    # rewards are measured against the SFT model, also where the loss leaves it out
    used = logps.per_token() if uses_means(config.loss) else logps
    beta = config.loss.beta
    chosen = beta * (used.policy_chosen_B - used.reference_chosen_B)
    rejected = beta * (used.policy_rejected_B - used.reference_rejected_B)
    return {
        "reward_accuracy": (chosen > rejected).double().tolist(),
        "reward_margin": (chosen - rejected).tolist(),
        "chosen_reward": chosen.tolist(),
        "rejected_reward": rejected.tolist(),
        "loss": preference_loss(config.loss, logps).tolist(),
    }
