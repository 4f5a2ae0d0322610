"""Slices, calibration and KL, by hand and against independent implementations."""

import math

import numpy as np
import pytest

from dpo.evaluate.answers import answer_figures
from dpo.evaluate.bootstrap import Bootstrap
from dpo.evaluate.calibration import calibration, confusion, roc
from dpo.evaluate.findings import findings
from dpo.evaluate.kl import kl_figures
from dpo.evaluate.parts import in_part
from dpo.evaluate.slices import slices
from dpo.modeling.generation import Answer


def bootstrap(n):
    return Bootstrap([str(i) for i in range(n)], n_bootstrap=200, seed=0)


def measured(accurate, chosen, rejected, sources=None, prompts=()):
    rewards = {"reward_accuracy": np.array(accurate, float), "reward_margin": np.zeros(len(chosen))}
    return slices(
        bootstrap(len(chosen)),
        rewards,
        sources=sources or ["a"] * len(chosen),
        prompt_tokens=prompts or [1] * len(chosen),
        chosen_tokens=np.array(chosen, float),
        rejected_tokens=np.array(rejected, float),
    )


def values(rows):
    return {row["slice"]: (row["n_pairs"], row["reward_accuracy"]["value"]) for row in rows}


def test_accuracy_by_source_by_hand():
    found = measured([1, 0, 1, 1], [2] * 4, [3] * 4, sources=["x", "x", "y", "x"])
    assert values(found["source"]) == {"x": (3, pytest.approx(2 / 3)), "y": (1, 1.0)}


def test_length_differences_by_hand():
    """30 against 20 is 1.5 times as long; 25 against 20 is longer; 20, 20 the same."""
    found = measured([1, 1, 0, 0, 1], [30, 25, 20, 20, 20], [20, 20, 20, 25, 30])
    assert values(found["length_difference"]) == {
        "chosen much longer": (1, 1.0),
        "chosen longer": (1, 1.0),
        "same length": (1, 0.0),
        "rejected longer": (1, 0.0),
        "rejected much longer": (1, 1.0),
    }
    # 2 of 2 right where chosen is longer, 1 of 2 where rejected is
    assert found["length_bias"]["value"] == 0.5


def test_a_slice_draws_its_resamples_once(monkeypatch):
    drawn, weights = [], Bootstrap.weights
    monkeypatch.setattr(Bootstrap, "weights", lambda self: drawn.append(1) or weights(self))
    found = measured([1, 0], [3, 2], [2, 3])
    n_slices = sum(len(found[name]) for name in ("source", "prompt_tokens", "length_difference"))
    # and one more for the length bias
    assert len(drawn) == n_slices + 1


def test_two_pairs_are_no_length_bias():
    """1 - 0, each of one prompt: from 0.05 - (1 - 0.05) to 1 - 0."""
    found = measured([1, 0], [3, 2], [2, 3])["length_bias"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((1, -0.9, 1))


def test_prompt_lengths_fall_into_four_bins_of_like_size():
    found = measured([1] * 8, [1] * 8, [1] * 8, prompts=[1, 2, 3, 4, 5, 6, 7, 8])
    assert [(row["slice"], row["n_pairs"]) for row in found["prompt_tokens"]] == [
        ("1 to 2 tokens", 2),
        ("3 to 4 tokens", 2),
        ("5 to 6 tokens", 2),
        ("7 to 8 tokens", 2),
    ]


def test_one_prompt_length_is_one_bin():
    found = measured([1, 0], [1, 1], [2, 2], prompts=[7, 7])
    assert values(found["prompt_tokens"]) == {"7 tokens": (2, 0.5)}


def test_auc_is_the_share_of_ordered_pairs():
    """Chosen 3, 1; rejected 2, 1: 3>2, 3>1, 1<2, 1=1: (1 + 1 + 0 + 1/2) / 4."""
    found = calibration(bootstrap(2), np.array([3.0, 1.0]), np.array([2.0, 1.0]))
    assert found["auc"]["value"] == pytest.approx(2.5 / 4)


def test_auc_equals_the_count_over_all_pairs():
    generator = np.random.default_rng(0)
    chosen, rejected = generator.normal(0.3, 1, 60).round(1), generator.normal(0, 1, 60).round(1)
    wins = sum((c > r) + (c == r) / 2 for c in chosen for r in rejected) / 3600
    found = calibration(bootstrap(60), chosen, rejected)
    assert found["auc"]["value"] == pytest.approx(wins)
    assert found["auc"]["low"] < wins < found["auc"]["high"]


def test_roc_by_hand():
    points = roc(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    shown = [(p["false_positive_rate"], p["true_positive_rate"]) for p in points]
    assert shown == [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)]


def test_a_long_roc_keeps_its_ends():
    generator = np.random.default_rng(0)
    points = roc(generator.normal(size=5000), generator.normal(size=5000))
    assert len(points) <= 101
    last = points[-1]
    assert (last["false_positive_rate"], last["true_positive_rate"]) == (1, 1)


def test_confusion_at_the_median_by_hand():
    """Median of 3, 1, 2, 0 is 1.5: chosen 3 above, 1 below; rejected 2 above, 0 below."""
    found = confusion(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    assert found["matrix"] == [[1, 1], [1, 1]]
    assert found["threshold"] == 1.5


def test_reliability_by_hand():
    """Margins log 9, -log 9, log 9, 0: confidences 0.9 (2 of 3 right) and 0.5 (half right).

    Error: 3/4 |2/3 - 0.9| + 1/4 |0.5 - 0.5| = 0.175.
    """
    margin = math.log(9)
    chosen = np.array([margin, 0.0, margin, 1.0])
    rejected = np.array([0.0, margin, 0.0, 1.0])
    found = calibration(bootstrap(4), chosen, rejected)
    assert [item["n_pairs"] for item in found["reliability"]] == [1, 3]
    assert found["reliability"][1]["confidence"] == pytest.approx(0.9)
    assert found["ece"]["value"] == pytest.approx(0.175)


def test_a_calibrated_reward_has_a_small_error():
    """Margins m whose pairs are right with probability sigmoid(m)."""
    generator = np.random.default_rng(0)
    margin = np.abs(generator.normal(0, 1, 20_000))
    right = generator.random(20_000) < 1 / (1 + np.exp(-margin))
    signed = np.where(right, margin, -margin)
    found = calibration(bootstrap(20_000), signed, np.zeros(20_000))
    assert found["ece"]["value"] < 0.015


def test_kl_by_hand():
    """d = log q/p of two tokens log 2 and 0: k3 = (2 - 1 - log 2) + 0, k1 = -log 2."""
    policy = [np.array([0.0, -1.0], np.float32)]
    reference = [np.array([math.log(2), -1.0], np.float32)]
    found = kl_figures(["p"], policy, reference, n_bootstrap=100, seed=0)
    assert found["per_answer"]["value"] == pytest.approx(1 - math.log(2), abs=1e-6)
    assert found["per_token"]["value"] == pytest.approx((1 - math.log(2)) / 2, abs=1e-6)
    assert found["k1"]["value"] == pytest.approx(-math.log(2), abs=1e-6)


def test_both_estimators_agree_with_the_exact_divergence():
    """KL of two distributions over three tokens is known; samples of the first estimate it."""
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.4, 0.4, 0.2])
    exact = float((p * np.log(p / q)).sum())
    drawn = np.random.default_rng(0).choice(3, size=40_000, p=p)
    ours = [np.log(p[[token]]).astype(np.float32) for token in drawn]
    theirs = [np.log(q[[token]]).astype(np.float32) for token in drawn]
    names = [str(i % 500) for i in range(len(drawn))]
    found = kl_figures(names, ours, theirs, n_bootstrap=200, seed=0)
    for name in ("per_answer", "k1"):
        assert found[name]["low"] < exact < found[name]["high"]
        assert found[name]["value"] == pytest.approx(exact, rel=0.05)


def test_a_divergence_beyond_all_numbers_is_still_one():
    lost, sure = [np.array([-5000.0], np.float32)], [np.array([0.0], np.float32)]
    found = kl_figures(["p"], lost, sure, n_bootstrap=100, seed=0)
    assert 1e200 < found["per_answer"]["value"] < math.inf


def test_equal_models_do_not_diverge():
    values_T = [np.array([-1.5, -0.5], np.float32)]
    found = kl_figures(["p"], values_T, values_T, n_bootstrap=100, seed=0)
    assert found["per_answer"]["value"] == 0


def test_the_end_token_is_no_part_of_an_answer():
    """Six equal tokens have three 4-grams, one of them distinct; eight have five."""
    end = 0
    sft = [Answer([9], [1] * 6 + [end], True), Answer([9], [1, 2, 3], False)]
    policy = [Answer([9], [1] * 8 + [end], True), Answer([9], [end], True)]
    given = {"sft": (sft, ["a a a a a a", "a b c"]), "policy": (policy, ["a a a a a a a a", ""])}
    found = answer_figures(["p", "q"], given, n_bootstrap=100, seed=0)
    names = ("tokens", "repetition", "empty", "cut_off")
    values = {key: [found[key][name]["value"] for name in names] for key in given}
    assert values["sft"] == pytest.approx([4.5, 1 / 3, 0, 0.5])
    assert values["policy"] == pytest.approx([4, 0.4, 0.5, 0])
    assert found["length_growth"]["value"] == pytest.approx(8 / 9)


def test_the_parts_share_no_prompt_and_lose_none():
    prompts = [f"prompt {i}" for i in range(4000)]
    validation = {p for p in prompts if in_part(p, "validation", 0.25)}
    test = {p for p in prompts if in_part(p, "test", 0.25)}
    assert not validation & test
    assert validation | test == set(prompts)
    assert len(validation) / 4000 == pytest.approx(0.25, abs=0.03)
    assert all(in_part(p, "all", 0.25) for p in prompts)


def evaluation(**changes):
    figure = {"value": 0.0, "low": -0.1, "high": 0.1}
    return {
        "before": {"chosen_logp": {**figure, "value": -100.0}},
        "change": {"chosen_logp": figure},
        "slices": {"length_bias": None},
        "calibration": {"ece": {"value": 0.01, "low": 0.0, "high": 0.02}},
    } | changes


def kinds(found):
    return [item["kind"] for item in findings(found)]


def test_nothing_is_called_out_without_reason():
    assert kinds(evaluation()) == []


@pytest.mark.parametrize(
    ("value", "high", "kind"),
    [
        *((-25.0, -20.0, ["collapse"]), (-5.0, -1.0, ["chosen_fell"]), (-25.0, 1.0, [])),
        # rounding of a sum of -100 in float32
        (-2e-6, -1e-6, []),
    ],
)
def test_collapse_is_a_fall_by_more_than_a_fifth_beyond_doubt(value, high, kind):
    change = {"chosen_logp": {"value": value, "low": -40.0, "high": high}}
    assert kinds(evaluation(change=change)) == kind


@pytest.mark.parametrize(("low", "kind"), [(0.02, ["length_bias"]), (-0.02, [])])
def test_length_bias_is_called_out_when_its_interval_is_above_zero(low, kind):
    bias = {"length_bias": {"value": 0.2, "low": low, "high": 0.4}}
    assert kinds(evaluation(slices=bias)) == kind


@pytest.mark.parametrize(("policy", "kind"), [(0.75, ["unended"]), (0.55, [])])
def test_answers_that_end_no_more_are_called_out(policy, kind):
    none = {"value": 0.0}
    of_each = {
        name: {"empty": none, "repetition": none, "cut_off": {"value": value}}
        for name, value in (("sft", 0.5), ("policy", policy))
    }
    found = findings(evaluation(answers=of_each))
    assert [item["kind"] for item in found] == kind
    for item in found:
        assert "75 % of the policy's answers did not end" in item["text"]
        assert "of the SFT model's 50 %: growth beyond that is not measured" in item["text"]


@pytest.mark.parametrize(("n", "kind"), [(1, ["few_prompts"]), (19, ["few_prompts"]), (20, [])])
def test_few_prompts_are_called_out(n, kind):
    assert kinds(evaluation(n_prompts=n)) == kind


DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}


@pytest.mark.parametrize(
    ("trained", "called_out"),
    [
        (DPO, False),
        ({**DPO, "beta": 0.5}, True),
        ({"name": "ipo", "beta": 0.1, "log_probs": "sum"}, True),
        # a setting that came later
        ({"name": "dpo", "beta": 0.1}, False),
        (None, False),
    ],
)
def test_a_policy_of_another_loss_is_called_out(trained, called_out):
    found = findings(evaluation(loss=DPO, policy={"loss": trained}))
    assert [item["kind"] for item in found] == ["other_loss"] * called_out
    if called_out:
        assert f"loss={trained['name']} loss.beta={trained['beta']}" in found[0]["text"]
