"""Losses against arithmetic by hand."""

import math

import pytest
import torch

from dpo.config.losses import DPOLoss, IPOLoss, SFTLoss
from dpo.modeling.losses import (
    PairLogps,
    dpo_loss,
    ipo_loss,
    preference_loss,
    sft_loss,
    starting_loss,
)


def logps(*values):
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in values))


def value(loss, pair):
    return float(preference_loss(loss, pair)[0])


# policy chosen -10, rejected -14; reference chosen -11, rejected -13:
# h = (-10 + 14) - (-11 + 13) = 4 - 2 = 2
PAIR = logps(-10.0, -14.0, -11.0, -13.0)


def test_dpo_by_hand():
    """beta h = 0.5 * 2 = 1; -log sigmoid(1) = log(1 + e^-1) = 0.313262."""
    assert value(DPOLoss(beta=0.5), PAIR) == pytest.approx(0.3132616875, abs=1e-9)


def test_conservative_dpo_by_hand():
    """0.9 log(1 + e^-1) + 0.1 log(1 + e^1) = 0.9 * 0.3132617 + 0.1 * 1.3132617 = 0.4132617."""
    loss = DPOLoss(beta=0.5, label_smoothing=0.1)
    assert value(loss, PAIR) == pytest.approx(0.4132616875, abs=1e-9)


def test_ipo_by_hand():
    """1 / (2 * 0.5) = 1; (2 - 1)^2 = 1."""
    assert value(IPOLoss(beta=0.5), PAIR) == pytest.approx(1.0, abs=1e-12)


def test_reference_free_dpo_by_hand():
    """h = -10 + 14 = 4; beta h = 2; log(1 + e^-2) = 0.126928."""
    loss = DPOLoss(beta=0.5, reference_free=True)
    assert value(loss, PAIR) == pytest.approx(0.1269280110, abs=1e-9)


def test_reference_free_ipo_by_hand():
    """(4 - 1)^2 = 9."""
    assert value(IPOLoss(beta=0.5, reference_free=True), PAIR) == pytest.approx(9.0, abs=1e-12)


def test_sft_is_the_negative_sum():
    assert sft_loss(torch.tensor([-3.5, -1.0])).tolist() == [3.5, 1.0]


def test_gradient_of_dpo_by_hand():
    """d/dh -log sigmoid(beta h) = -beta sigmoid(-beta h): -0.5 * 0.2689414 at h = 2."""
    h = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(h, 0.5).sum().backward()
    assert float(h.grad[0]) == pytest.approx(-0.1344707107, abs=1e-9)


def test_gradient_of_ipo_by_hand():
    """2 (h - 1 / (2 beta)) = 2 (2 - 1) = 2."""
    h = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    ipo_loss(h, 0.5).sum().backward()
    assert float(h.grad[0]) == pytest.approx(2.0, abs=1e-12)


def test_a_large_margin_the_wrong_way_stays_finite():
    """-log sigmoid(x) is close to -x for a large negative x."""
    assert float(dpo_loss(torch.tensor([-1e5]), 0.1)[0]) == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(beta=0.3), math.log(2)),
        (DPOLoss(beta=0.3, label_smoothing=0.2), math.log(2)),
        (IPOLoss(beta=0.1), 25.0),  # (0 - 1 / 0.2)^2
        (DPOLoss(reference_free=True), None),
        (SFTLoss(), None),
    ],
)
def test_loss_of_equal_models(loss, expected):
    assert starting_loss(loss) == (expected if expected is None else pytest.approx(expected))
