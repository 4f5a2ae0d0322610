"""Losses on preference pairs, as pure functions of log-probabilities.

Axes: B pairs. ``*_logps_B`` are log-probabilities of whole responses given their prompts, summed
over tokens (IPO may take means). ``logits_B`` is the difference of log-ratios, the paper's h:

    h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.config.losses import AnyLoss, DPOLoss, IPOLoss, SFTLoss


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of the responses of B pairs under policy and reference."""

    policy_chosen_B: Tensor
    policy_rejected_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor

    def log_ratio_difference(self, *, reference_free: bool) -> Tensor:
        """h of shape [B]; with ``reference_free`` the reference's share is 0."""
        policy_B = self.policy_chosen_B - self.policy_rejected_B
        if reference_free:
            return policy_B
        return policy_B - (self.reference_chosen_B - self.reference_rejected_B)


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


def ipo_loss(logits_B: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation; shape [B].

    (h - 1 / (2 beta))^2: equation 17 of Azar et al. 2023 (arXiv 2310.12036), beta its tau.
    """
    return (logits_B - 1 / (2 * beta)) ** 2


def preference_loss(loss: AnyLoss, logps: PairLogps) -> Tensor:
    """Loss of each pair by the configured function; shape [B]."""
    match loss:
        case DPOLoss():
            logits_B = logps.log_ratio_difference(reference_free=loss.reference_free)
            return dpo_loss(logits_B, loss.beta, loss.label_smoothing)
        case IPOLoss():
            logits_B = logps.log_ratio_difference(reference_free=loss.reference_free)
            return ipo_loss(logits_B, loss.beta)
        case SFTLoss():
            raise TypeError("sft is not a loss on pairs")


def starting_loss(loss: AnyLoss) -> float | None:
    """The loss while policy and reference are equal, h = 0; None where it depends on the data."""
    if isinstance(loss, SFTLoss) or loss.reference_free:
        return None
    zero_B = torch.zeros(1, dtype=torch.float64)
    logps = PairLogps(zero_B, zero_B, zero_B, zero_B)
    return float(preference_loss(loss, logps)[0])
