"""Losses on preference pairs, as pure functions of log-probabilities.

Axes: B pairs. ``logps`` are log-probabilities of whole responses given their prompts, summed over
tokens, or their means where a loss says so. ``logits_B`` is the difference of log-ratios, h:

    h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.config.losses import (
    AnyLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    ORPOLoss,
    RobustLoss,
    SFTLoss,
    SimPOLoss,
)


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the responses of B pairs under policy and reference; each [B]."""

    policy_chosen_B: Tensor
    policy_rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    chosen_tokens_B: Tensor
    """Lengths of the responses, in tokens."""
    rejected_tokens_B: Tensor

    def log_ratio_difference(self, *, reference_free: bool) -> Tensor:
        """h of shape [B]; with ``reference_free`` the reference's share is 0."""
        policy_B = self.policy_chosen_B - self.policy_rejected_B
        if reference_free:
            return policy_B
        return policy_B - (self.reference_chosen_B - self.reference_rejected_B)

    def per_token(self) -> PairLogps:
        """Means over the tokens in place of sums."""
        return replace(
            self,
            policy_chosen_B=self.policy_chosen_B / self.chosen_tokens_B,
            policy_rejected_B=self.policy_rejected_B / self.rejected_tokens_B,
            reference_chosen_B=self.reference_chosen_B / self.chosen_tokens_B,
            reference_rejected_B=self.reference_rejected_B / self.rejected_tokens_B,
        )

    def without_reference(self) -> PairLogps:
        """The reference's share set to 0."""
        zero_B = torch.zeros_like(self.reference_chosen_B)
        return replace(self, reference_chosen_B=zero_B, reference_rejected_B=zero_B)


def sft_loss(logps_B: Tensor) -> Tensor:
    """Negative log-likelihood of each target, summed over its tokens; shape [B]."""
    return -logps_B


def dpo_loss(logits_B: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation; shape [B].

    -log sigmoid(beta h) (1 - eps) - log sigmoid(-beta h) eps: equation 7 of Rafailov et al. 2023
    (arXiv 2305.18290); eps is the share of flipped labels that Mitchell's note on conservative DPO
    assumes.
    """
    return (
        -F.logsigmoid(beta * logits_B) * (1 - label_smoothing)
        - F.logsigmoid(-beta * logits_B) * label_smoothing
    )


def robust_loss(logits_B: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO; shape [B].

    (-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps): equation 9 of
    Chowdhury et al. 2024 (arXiv 2403.00409), whose mean over flipped labels is DPO's loss.
    """
    return (
        -F.logsigmoid(beta * logits_B) * (1 - label_smoothing)
        + F.logsigmoid(-beta * logits_B) * label_smoothing
    ) / (1 - 2 * label_smoothing)


def hinge_loss(logits_B: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta h); shape [B]: the calibration loss of SLiC (Zhao et al. 2023, arXiv
    2305.10425) on log-ratios, as RSO writes it (Liu et al. 2023, arXiv 2309.06657)."""
    return torch.relu(1 - beta * logits_B)


def ipo_loss(logits_B: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation; shape [B].

    (h - 1 / (2 beta))^2: equation 17 of Azar et al. 2023 (arXiv 2310.12036), beta its tau.
    """
    return (logits_B - 1 / (2 * beta)) ** 2


def simpo_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation on mean log-probabilities; shape [B].

    -log sigmoid(beta chosen - beta rejected - gamma): equation 6 of Meng et al. 2024 (arXiv
    2405.14734).
    """
    return -F.logsigmoid(beta * (chosen_B - rejected_B) - gamma)


def orpo_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float) -> Tensor:
    """Odds-ratio preference optimisation on mean log-probabilities; shape [B].

    -chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p):
    equations 6 and 7 of Hong et al. 2024 (arXiv 2403.07691), beta its lambda.
    """
    log_odds_B = (chosen_B - rejected_B) - (_log1mexp(chosen_B) - _log1mexp(rejected_B))
    return -chosen_B - beta * F.logsigmoid(log_odds_B)


def _log1mexp(log_p_B: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, precise at both ends."""
    # where() evaluates both branches: keep each away from where its gradient is infinite
    near_B = log_p_B > -0.6931
    inner_B = torch.where(near_B, log_p_B.clamp(max=-1e-7), -1.0)
    outer_B = torch.where(near_B, -1.0, log_p_B)
    return torch.where(near_B, torch.log(-torch.expm1(inner_B)), torch.log1p(-torch.exp(outer_B)))


def uses_means(loss: AnyLoss) -> bool:
    """Whether the loss is defined on means over tokens rather than sums."""
    return isinstance(loss, SimPOLoss | ORPOLoss) or (
        isinstance(loss, IPOLoss) and loss.log_probs == "mean"
    )


def as_used(loss: AnyLoss, logps: PairLogps) -> PairLogps:
    """What the loss sees: sums or means, with or without the reference."""
    used = logps.per_token() if uses_means(loss) else logps
    return used if loss.needs_reference else used.without_reference()


def preference_loss(loss: AnyLoss, logps: PairLogps) -> Tensor:
    """Loss of each pair by the configured function; shape [B]. ``logps`` are sums."""
    used = as_used(loss, logps)
    match loss:
        case SimPOLoss():
            return simpo_loss(used.policy_chosen_B, used.policy_rejected_B, loss.beta, loss.gamma)
        case ORPOLoss():
            return orpo_loss(used.policy_chosen_B, used.policy_rejected_B, loss.beta)
        case SFTLoss():
            raise TypeError("sft is not a loss on pairs")
    reference_free = getattr(loss, "reference_free", False)
    losses_B = _on_log_ratios(loss, used.log_ratio_difference(reference_free=reference_free))
    if loss.sft_weight:
        losses_B = losses_B - loss.sft_weight * logps.per_token().policy_chosen_B
    return losses_B


def _on_log_ratios(loss: DPOLoss | RobustLoss | HingeLoss | IPOLoss, logits_B: Tensor) -> Tensor:
    match loss:
        case DPOLoss():
            return dpo_loss(logits_B, loss.beta, loss.label_smoothing)
        case RobustLoss():
            return robust_loss(logits_B, loss.beta, loss.label_smoothing)
        case HingeLoss():
            return hinge_loss(logits_B, loss.beta)
        case IPOLoss():
            return ipo_loss(logits_B, loss.beta)


def starting_loss(loss: AnyLoss, drift: float = 0.0) -> float | None:
    """The loss while policy and reference are equal, h = ``drift``; None where data decides it."""
    fixed = loss.needs_reference and not getattr(loss, "reference_free", False)
    has_sft_term = not isinstance(loss, SFTLoss | SimPOLoss | ORPOLoss) and loss.sft_weight > 0
    if not fixed or has_sft_term:
        return None
    zero_B = torch.zeros(1, dtype=torch.float64)
    logps = PairLogps(zero_B + drift, zero_B, zero_B, zero_B, zero_B + 1, zero_B + 1)
    return float(preference_loss(loss, logps)[0])
