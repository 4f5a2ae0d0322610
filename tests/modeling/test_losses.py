"""Losses against arithmetic by hand."""

import math

import pytest
import torch

from dpo.config.losses import (
    DPOLoss,
    HingeLoss,
    IPOLoss,
    ORPOLoss,
    RobustLoss,
    SFTLoss,
    SimPOLoss,
)
from dpo.modeling.losses import (
    PairLogps,
    dpo_loss,
    ipo_loss,
    orpo_loss,
    preference_loss,
    sft_loss,
    starting_loss,
)


def logps(*values, tokens=(2, 4)):
    return PairLogps(*(torch.tensor([value], dtype=torch.float64) for value in (*values, *tokens)))


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


def test_ipo_on_means_by_hand():
    """Chosen has 2 tokens, rejected 4: h = (-5 + 3.5) - (-5.5 + 3.25) = 0.75; (0.75 - 1)^2."""
    assert value(IPOLoss(beta=0.5, log_probs="mean"), PAIR) == pytest.approx(0.0625, abs=1e-12)


def test_robust_dpo_by_hand():
    """(0.9 * 0.3132617 - 0.1 * 1.3132617) / 0.8 = (0.2819355 - 0.1313262) / 0.8 = 0.1882617."""
    loss = RobustLoss(beta=0.5, label_smoothing=0.1)
    assert value(loss, PAIR) == pytest.approx(0.1882616875, abs=1e-9)


def test_robust_dpo_is_unbiased():
    """Its mean over labels flipped with probability eps is DPO's loss on the true labels."""
    flipped = logps(-14.0, -10.0, -13.0, -11.0)
    loss = RobustLoss(beta=0.5, label_smoothing=0.3)
    mean = 0.7 * value(loss, PAIR) + 0.3 * value(loss, flipped)
    assert mean == pytest.approx(value(DPOLoss(beta=0.5), PAIR), abs=1e-12)


def test_hinge_by_hand():
    """1 - 0.25 * 2 = 0.5; a margin beyond 1 costs nothing."""
    assert value(HingeLoss(beta=0.25), PAIR) == pytest.approx(0.5, abs=1e-12)
    assert value(HingeLoss(beta=0.75), PAIR) == 0.0


def test_simpo_by_hand():
    """Means -5 and -3.5: 2 (-5 + 3.5) - 0.5 = -3.5; log(1 + e^3.5) = 3.5297504."""
    assert value(SimPOLoss(beta=2.0, gamma=0.5), PAIR) == pytest.approx(3.5297504183, abs=1e-9)


def test_orpo_by_hand():
    """Means log 0.5, log 0.2: odds 1 and 0.25, ratio 4; -log 0.5 + 0.1 log(1 + 1/4)."""
    pair = logps(2 * math.log(0.5), 4 * math.log(0.2), 0.0, 0.0)
    assert value(ORPOLoss(beta=0.1), pair) == pytest.approx(0.6931471806 + 0.0223143551, abs=1e-9)


def test_orpo_stays_finite_at_both_ends():
    certain = torch.tensor([-1e-9, -300.0], dtype=torch.float64, requires_grad=True)
    losses = orpo_loss(certain, certain.flip(0), 0.1)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(certain.grad).all()


def test_an_sft_term_adds_the_loss_per_token():
    """Chosen: 10 over 2 tokens = 5; 0.3132617 + 0.2 * 5."""
    assert value(DPOLoss(beta=0.5, sft_weight=0.2), PAIR) == pytest.approx(1.3132616875, abs=1e-9)


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
        (RobustLoss(beta=0.3, label_smoothing=0.2), math.log(2)),
        (HingeLoss(beta=0.3), 1.0),
        (SimPOLoss(), None),
        (ORPOLoss(), None),
        (DPOLoss(sft_weight=1.0), None),
        (DPOLoss(beta=0.3), math.log(2)),
        (DPOLoss(beta=0.3, label_smoothing=0.2), math.log(2)),
        (IPOLoss(beta=0.1), 25.0),  # (0 - 1 / 0.2)^2
        (DPOLoss(reference_free=True), None),
        (SFTLoss(), None),
    ],
)
def test_loss_of_equal_models(loss, expected):
    assert starting_loss(loss) == (expected if expected is None else pytest.approx(expected))
