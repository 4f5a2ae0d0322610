"""A configuration class per loss: an option that the chosen loss ignores is unknown to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo.config.base import Section


class SFTLoss(Section):
    """Supervised fine-tuning: the negative log-likelihood of the target, summed over its tokens."""

    name: Literal["sft"] = "sft"
    """Which loss."""


class DPOLoss(Section):
    """Direct preference optimisation; with ``label_smoothing`` above 0, its conservative form."""

    name: Literal["dpo"] = "dpo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference; the paper uses 0.1 to 0.5."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO, equation 3 of its note)."""
    reference_free: bool = False
    """Leave the reference out of the loss (the rewards still use it)."""


class IPOLoss(Section):
    """Identity preference optimisation (equation 17 of its paper)."""

    name: Literal["ipo"] = "ipo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """The paper's tau: the margin is regressed to 1 / (2 beta)."""
    reference_free: bool = False
    """Leave the reference out of the loss (the rewards still use it)."""
    log_probs: Literal["sum", "mean"] = "sum"
    """``sum`` over a response's tokens as the reference code does, or ``mean`` as TRL does."""


AnyLoss = Annotated[SFTLoss | DPOLoss | IPOLoss, Field(discriminator="name")]
"""The loss section; ``name`` selects the class."""
