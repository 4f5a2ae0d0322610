"""Figures of a preference batch, under the reference code's names. Axes: B pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpo.modeling.losses import PairLogps

Split = Literal["train", "eval"]


def preference_metrics(
    logps: PairLogps, losses_B: Tensor, beta: float, split: Split
) -> dict[str, Tensor]:
    """Each figure for each pair, shape [B]; a batch's figure is the mean.

    Rewards are beta times the log-ratio of policy and reference, also where the loss leaves the
    reference out. A pair counts as accurate when the chosen reward is strictly the larger.
    """
    chosen_B = beta * (logps.policy_chosen_B - logps.reference_chosen_B).detach()
    rejected_B = beta * (logps.policy_rejected_B - logps.reference_rejected_B).detach()
    return {
        f"rewards_{split}/chosen": chosen_B,
        f"rewards_{split}/rejected": rejected_B,
        f"rewards_{split}/accuracies": (chosen_B > rejected_B).to(torch.float32),
        f"rewards_{split}/margins": chosen_B - rejected_B,
        f"logps_{split}/rejected": logps.policy_rejected_B.detach(),
        f"logps_{split}/chosen": logps.policy_chosen_B.detach(),
        f"loss/{split}": losses_B.detach(),
    }


def sft_metrics(logps_B: Tensor, losses_B: Tensor, split: Split) -> dict[str, Tensor]:
    """Each figure for each example, shape [B]."""
    return {f"logps_{split}/chosen": logps_B.detach(), f"loss/{split}": losses_B.detach()}
