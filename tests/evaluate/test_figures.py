"""Held-out figures and their intervals, by hand and against another implementation."""

import math
import tracemalloc

import numpy as np
import pytest

from dpo.config.losses import DPOLoss, IPOLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.evaluate.bootstrap import Bootstrap, intervals
from dpo.evaluate.heldout import HeldOut, figures
from dpo.evaluate.report import headline


def row(chosen, rejected):
    values = (np.asarray(side, dtype=np.float32) for side in (chosen, rejected))
    return PairLogProbs("test", "", *values)


# sums before: (-3, -4), (-6, -2); after: (-2, -5), (-5, -2)
BEFORE = [row([-1, -2], [-4]), row([-6], [-1, -1])]
AFTER = [row([-1, -1], [-5]), row([-5], [-1, -1])]


def values(loss):
    held_out = HeldOut(["p", "q"], BEFORE, AFTER)
    return figures(held_out, RunConfig(loss=loss))


def test_accuracies_by_hand():
    """Chosen is likelier in the first pair only, summed (-3 > -4) and per token (-1.5 > -4)."""
    found = values(DPOLoss(beta=0.5))
    assert found["before"]["accuracy_sum"]["value"] == 0.5
    assert found["before"]["accuracy_per_token"]["value"] == 0.5


def test_rewards_by_hand():
    """Chosen rewards 0.5 (-2 + 3) = 0.5 and 0.5 (-5 + 6) = 0.5; rejected -0.5 and 0."""
    found = values(DPOLoss(beta=0.5))["after"]
    assert found["chosen_reward"]["value"] == pytest.approx(0.5)
    assert found["rejected_reward"]["value"] == pytest.approx(-0.25)
    assert found["reward_margin"]["value"] == pytest.approx(0.75)
    assert found["reward_accuracy"]["value"] == 1.0


def test_dpo_loss_by_hand():
    """Margins 1 and 0.5: log(1 + e^-1) = 0.3132617, log(1 + e^-0.5) = 0.4740770; mean 0.3936693."""
    found = values(DPOLoss(beta=0.5))["after"]["loss"]["value"]
    assert found == pytest.approx(0.3936693, abs=1e-6)


def test_ipo_loss_by_hand():
    """h is 2 and 1, 1 / (2 beta) = 1: (1 + 0) / 2."""
    assert values(IPOLoss(beta=0.5))["after"]["loss"]["value"] == pytest.approx(0.5)


def test_ipo_with_means_by_hand():
    """Per token h: (-1 + 5) - (-1.5 + 4) = 1.5 and (-5 + 1) - (-6 + 1) = 1; 0.25 and 0."""
    found = values(IPOLoss(beta=0.5, log_probs="mean"))["after"]["loss"]["value"]
    assert found == pytest.approx(0.125)


def test_intervals_of_unique_prompts_are_those_of_the_normal_approximation():
    """mean +- 1.96 s / sqrt(n), which the bootstrap of a mean approaches."""
    sample = np.random.default_rng(0).normal(size=400)
    found = intervals({"x": sample}, [str(i) for i in range(400)], n_bootstrap=20_000, seed=1)["x"]
    half = 1.96 * sample.std() / 20
    assert found.value == pytest.approx(sample.mean())
    assert found.low == pytest.approx(sample.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(sample.mean() + half, abs=0.03 * half)


def test_pairs_of_one_prompt_are_drawn_together():
    """Ten copies of 20 values are no more than 20 values."""
    generator = np.random.default_rng(0)
    sample = generator.normal(size=20)
    names = [str(i) for i in range(20)]
    once = intervals({"x": sample}, names, n_bootstrap=2000, seed=0)["x"]
    often = intervals({"x": np.repeat(sample, 10)}, np.repeat(names, 10), n_bootstrap=2000, seed=0)
    assert often["x"].high - often["x"].low == pytest.approx(once.high - once.low, rel=0.05)


@pytest.mark.parametrize(
    ("values", "groups", "expected"),
    [
        # 0.05 ^ (1/n) for n prompts, whatever the number of their pairs (Clopper and Pearson)
        ([1, 1], "pq", (1, 0.2236, 1)),
        ([1, 1, 1, 1], "ppqq", (1, 0.2236, 1)),
        ([1] * 20, "abcdefghijklmnopqrst", (1, 0.8609, 1)),
        ([0, 0, 0], "pqr", (0, 0, 1 - 0.3684)),
        ([1], "p", (1, 0.05, 1)),
        # in floating point 0.05 ^ (1/24) + 1 - 0.05 ^ (1/24) is less than 1
        ([1] * 24, "ABCDEFGHIJKLMNOPQRSTUVWX", (1, 0.8827, 1)),
        # what is not known to agree may be all wrong or all right: 0.2236 / 2 + (0 to 0.7764)
        ([0.5, 0.5], "pq", (0.5, 0.1118, 0.8882)),
        ([1, 0, 1, 1], "pppp", (0.75, 0.0375, 0.9875)),
    ],
)
def test_prompts_that_all_agree_are_no_certainty(values, groups, expected):
    bootstrap = Bootstrap(list(groups), n_bootstrap=100, seed=0)
    found = bootstrap.shares({"x": values})["x"]
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=5e-5)
    assert found.low <= found.value <= found.high
    # the same prompts among others
    mask_n = np.array([1.0] * len(values) + [0.0] * 9)
    wider = Bootstrap([*groups, *"abcdefghi"], n_bootstrap=100, seed=0)
    found = wider.shares({"x": [*values, *[0.5] * 9]}, mask_n)["x"]
    assert (found.value, found.low, found.high) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 50, 200])
def test_one_more_right_prompt_never_lowers_the_bound(n):
    """20 prompts: 19 right may be 3 wrong of 20 in a resample, 0.85; 20 right, 0.8609."""
    bootstrap = Bootstrap([str(i) for i in range(n)], n_bootstrap=2000, seed=0)
    but_one = bootstrap.shares({"x": [0] + [1] * (n - 1)})["x"]
    assert bootstrap.shares({"x": [1] * n})["x"].low >= but_one.low


def test_two_pairs_that_are_both_right_do_not_show_a_preference():
    """Reward accuracy 1 of 2 prompts: its lower bound is 0.05 ^ (1/2) = 0.224, below chance."""
    found = values(DPOLoss(beta=0.5))
    assert found["after"]["reward_accuracy"]["low"] == pytest.approx(0.05**0.5)
    assert found["slices"]["source"][0]["reward_accuracy"]["low"] == pytest.approx(0.05**0.5)
    assert "do not show" in headline(found)[0]


def test_a_policy_that_is_the_sft_model_learned_no_opposite():
    """Not even where the last bit of a sum differs, which makes ties of some pairs only."""
    after = [row(pair.chosen * (1 - 1e-7), pair.rejected) for pair in BEFORE]
    found = figures(HeldOut(["p", "q"] * 20, BEFORE * 20, after * 20), RunConfig())
    text, tone = headline(found)
    assert "no other than the SFT model" in text
    assert tone == "bad"


def test_a_perplexity_beyond_all_numbers_is_still_one():
    lost = figures(HeldOut(["p"], BEFORE[:1], [row([-1e6], [-1e6, -1])]), RunConfig())
    assert 1e300 < lost["after"]["perplexity"]["value"] < math.inf
    assert 1e300 < lost["change"]["perplexity_growth"]["high"] < math.inf


def test_one_long_prompt_takes_no_memory_for_the_others():
    """As an array of texts a thousand prompts of the longest one's width: 4 GB."""
    groups = [f"prompt {number}" for number in range(1000)] + ["y" * 1_000_000]
    tracemalloc.start()
    bootstrap = Bootstrap(groups, n_bootstrap=10, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bootstrap.n_groups == 1001
    assert peak < 10_000_000


def test_prompts_are_numbered_in_their_order_and_none_are_merged():
    bootstrap = Bootstrap(["b", "a\0", "a", "b", "é"], n_bootstrap=10, seed=0)
    assert bootstrap.group_n.tolist() == [2, 1, 0, 2, 3]


def test_a_tie_is_not_accurate():
    held_out = HeldOut(["p"], BEFORE[:1], BEFORE[:1])
    found = figures(held_out, RunConfig(loss=DPOLoss()))
    assert found["after"]["reward_accuracy"]["value"] == 0.0
