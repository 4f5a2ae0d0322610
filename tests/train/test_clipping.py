"""Gradients are scaled down to the largest norm that is allowed, and else left alone."""

import pytest
import torch

from dpo.train.step import clip_gradients


def two_weights() -> list[torch.nn.Parameter]:
    """Gradients 3 and 4, norm 5."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for weight, value in zip(weights, (3.0, 4.0), strict=True):
        weight.grad = torch.tensor([value])
    return weights


def test_a_norm_of_5_is_halved_to_2_and_a_half():
    weights = two_weights()
    assert clip_gradients(weights, 2.5) == 5.0
    assert [float(weight.grad) for weight in weights] == pytest.approx([1.5, 2.0], rel=1e-6)


@pytest.mark.parametrize("max_norm", [2.5, 5.0, 5.000001, 5.1])
def test_gradients_are_those_that_torch_makes_bit_for_bit(max_norm):
    weights, expected = two_weights(), two_weights()
    norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
    assert clip_gradients(weights, max_norm) == float(norm)
    assert [weight.grad for weight in weights] == [weight.grad for weight in expected]


def test_weights_without_a_gradient_do_not_count():
    weights = [*two_weights(), torch.nn.Parameter(torch.zeros(1))]
    assert clip_gradients(weights, 10.0) == 5.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told(bad):
    weights = two_weights()
    weights[0].grad = torch.tensor([bad])
    assert not clip_gradients(weights, 10.0) < float("inf")
