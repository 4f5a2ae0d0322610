"""Figures on held-out pairs: the SFT model (the reference) before, the policy after.

Axes: n pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.evaluate.bootstrap import Array, Bootstrap, Interval, interval
from dpo.evaluate.calibration import calibration
from dpo.evaluate.slices import slices
from dpo.modeling.losses import PairLogps, preference_loss, uses_means

CHANCE = 0.5
_MOST_NATS = 700.0
"""Of the mean loss of a token whose exponential is taken."""


@dataclass(frozen=True)
class HeldOut:
    """Log-probabilities of the same n pairs under both models, and what the pairs are."""

    prompts: Sequence[str]
    before: Sequence[PairLogProbs]
    after: Sequence[PairLogProbs]
    sources: Sequence[str] = ()
    """Name of the source of each pair."""
    prompt_tokens: Sequence[int] = ()
    published: Sequence[PairLogProbs] = field(default=())
    """The same under the published version, where it was asked for."""


@dataclass(frozen=True)
class Sums:
    """What one model gives to each response of n pairs: sums over tokens, and lengths."""

    chosen_n: Array
    rejected_n: Array
    chosen_tokens_n: Array
    rejected_tokens_n: Array

    @classmethod
    def of(cls, rows: Sequence[PairLogProbs]) -> Sums:
        """Sums of log-probabilities, in float64."""
        return cls(
            *(
                np.array([getattr(row, side).sum(dtype=np.float64) for row in rows])
                for side in ("chosen", "rejected")
            ),
            *(
                np.array([len(getattr(row, side)) for row in rows], dtype=np.float64)
                for side in ("chosen", "rejected")
            ),
        )


def figures(held_out: HeldOut, config: RunConfig) -> dict[str, Any]:
    """Everything that is measured on held-out pairs, each with its interval.

    ``accuracy_sum`` is the share of pairs where the chosen response has the larger log-probability,
    ``accuracy_per_token`` the same for the mean over its tokens; ``reward_accuracy`` compares the
    rewards, beta times the log-ratio to the reference, strictly. ``perplexity`` is
    exp(-sum of log-probabilities / sum of tokens) over the chosen responses.
    """
    bootstrap = Bootstrap(
        held_out.prompts, n_bootstrap=config.evaluation.n_bootstrap, seed=config.seed
    )
    before, after = Sums.of(held_out.before), Sums.of(held_out.after)
    rewards = _rewards(after, before, config)
    result: dict[str, Any] = {
        "n_pairs": len(held_out.prompts),
        "n_prompts": bootstrap.n_groups,
        "chance": CHANCE,
        "before": _of_model(bootstrap, before),
        "after": _of_model(bootstrap, after) | _of_rewards(bootstrap, rewards),
        "change": _change(bootstrap, before, after),
        "slices": slices(
            bootstrap,
            rewards,
            sources=held_out.sources or ["all"] * len(held_out.prompts),
            prompt_tokens=held_out.prompt_tokens,
            chosen_tokens=after.chosen_tokens_n,
            rejected_tokens=after.rejected_tokens_n,
        ),
        "calibration": calibration(bootstrap, rewards["chosen_reward"], rewards["rejected_reward"]),
    }
    if held_out.published:
        result["published"] = _published(bootstrap, held_out, before, rewards, config)
    return result


def pair_values(held_out: HeldOut, config: RunConfig) -> dict[str, list[float]]:
    """Rewards and log-probabilities of each pair, in the order of the pairs."""
    before, after = Sums.of(held_out.before), Sums.of(held_out.after)
    values = {
        **_rewards(after, before, config),
        "chosen_logp_before": before.chosen_n,
        "rejected_logp_before": before.rejected_n,
        "chosen_logp_after": after.chosen_n,
        "rejected_logp_after": after.rejected_n,
        "chosen_tokens": after.chosen_tokens_n,
        "rejected_tokens": after.rejected_tokens_n,
    }
    return {name: [float(value) for value in column] for name, column in values.items()}


def _published(
    bootstrap: Bootstrap, held_out: HeldOut, before: Sums, rewards: dict[str, Array], config: Any
) -> dict[str, Any]:
    """The published version on the same pairs, and what the policy gained over it."""
    sums = Sums.of(held_out.published)
    theirs = _rewards(sums, before, config)
    gained = {name: rewards[name] - theirs[name] for name in ("reward_accuracy", "reward_margin")}
    return {
        **_of_model(bootstrap, sums),
        **_of_rewards(bootstrap, theirs),
        "improvement": _json(bootstrap.means(gained)),
    }


def _json(found: dict[str, Interval]) -> dict[str, Any]:
    return {name: figure.as_json() for name, figure in found.items()}


def _of_model(bootstrap: Bootstrap, sums: Sums) -> dict[str, Any]:
    chosen_mean_n = sums.chosen_n / sums.chosen_tokens_n
    shares = {
        "accuracy_sum": _likelier(sums),
        "accuracy_per_token": _likelier_per_token(sums),
    }
    values = {
        "chosen_logp": sums.chosen_n,
        "rejected_logp": sums.rejected_n,
        "chosen_nll_per_token": -chosen_mean_n,
    }
    ratios = bootstrap.ratios({"nll": (-sums.chosen_n, sums.chosen_tokens_n)})
    perplexity = _exponentials(*ratios["nll"])
    measured = bootstrap.means({**shares, **values}, shares=shares)
    return _json({**measured, "perplexity": perplexity})


def _of_rewards(bootstrap: Bootstrap, rewards: dict[str, Array]) -> dict[str, Any]:
    return _json(bootstrap.means(rewards, shares={"reward_accuracy"}))


def _exponentials(value: float, draws_B: Array) -> Interval:
    # what is larger has no number, and JSON none for infinity
    return interval(float(np.exp(min(value, _MOST_NATS))), np.exp(np.minimum(draws_B, _MOST_NATS)))


def _likelier(sums: Sums) -> Array:
    return (sums.chosen_n > sums.rejected_n).astype(np.float64)


def _likelier_per_token(sums: Sums) -> Array:
    chosen_n = sums.chosen_n / sums.chosen_tokens_n
    return (chosen_n > sums.rejected_n / sums.rejected_tokens_n).astype(np.float64)


def _change(bootstrap: Bootstrap, before: Sums, after: Sums) -> dict[str, Any]:
    """Differences on the same pairs, whose intervals are narrower than those of either side."""
    chosen_n, rejected_n = after.chosen_n - before.chosen_n, after.rejected_n - before.rejected_n
    ratio = bootstrap.ratios({"nll": (-chosen_n, after.chosen_tokens_n)})["nll"]
    growth = _exponentials(*ratio)
    means = bootstrap.means(
        {
            "chosen_logp": chosen_n,
            "rejected_logp": rejected_n,
            "accuracy_sum": _likelier(after) - _likelier(before),
            "accuracy_per_token": _likelier_per_token(after) - _likelier_per_token(before),
        }
    )
    return _json({**means, "perplexity_growth": growth})


def _rewards(policy: Sums, reference: Sums, config: RunConfig) -> dict[str, Array]:
    assert not isinstance(config.loss, SFTLoss)
    columns = (
        policy.chosen_n,
        policy.rejected_n,
        reference.chosen_n,
        reference.rejected_n,
        policy.chosen_tokens_n,
        policy.rejected_tokens_n,
    )
    logps = PairLogps(*(torch.from_numpy(column) for column in columns))
    # rewards are measured against the SFT model, also where the loss leaves it out
    used = logps.per_token() if uses_means(config.loss) else logps
    beta = config.loss.beta
    chosen = beta * (used.policy_chosen_B - used.reference_chosen_B)
    rejected = beta * (used.policy_rejected_B - used.reference_rejected_B)
    return {
        "reward_accuracy": (chosen > rejected).double().numpy(),
        "reward_margin": (chosen - rejected).numpy(),
        "chosen_reward": chosen.numpy(),
        "rejected_reward": rejected.numpy(),
        "loss": preference_loss(config.loss, logps).numpy(),
    }
