"""A configuration class per loss: an option that the chosen loss ignores is unknown to it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dpo.config.base import Section


class SFTLoss(Section):
    """Supervised fine-tuning: the negative log-likelihood of the target, summed over its tokens."""

    needs_reference: ClassVar[bool] = False
    name: Literal["sft"] = "sft"
    """Which loss."""


class _WithReference(Section):
    """What losses on the log-ratio of policy and reference have in common."""

    needs_reference: ClassVar[bool] = True
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the chosen response's negative log-likelihood per token, added to the loss (RPO,
    equation 1 of arXiv 2404.19733 with 1)."""


class DPOLoss(_WithReference):
    """Direct preference optimisation; with ``label_smoothing`` above 0, its conservative form."""

    name: Literal["dpo"] = "dpo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference; the paper uses 0.1 to 0.5."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of flipped preferences (conservative DPO, equation 3 of its note)."""
    reference_free: bool = False
    """Leave the reference out of the loss (the rewards still use it)."""


class RobustLoss(_WithReference):
    """Robust DPO: unbiased under a known share of flipped labels."""

    name: Literal["robust"] = "robust"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.1, gt=0, lt=0.5)
    """The share of flipped preferences in the data."""


class HingeLoss(_WithReference):
    """A margin of 1 / beta between the log-ratios, as SLiC has it."""

    name: Literal["hinge"] = "hinge"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """Inverse of the margin."""
    reference_free: bool = False
    """Leave the reference out of the loss (the rewards still use it)."""


class IPOLoss(_WithReference):
    """Identity preference optimisation (equation 17 of its paper)."""

    name: Literal["ipo"] = "ipo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """The paper's tau: the margin is regressed to 1 / (2 beta)."""
    reference_free: bool = False
    """Leave the reference out of the loss (the rewards still use it)."""
    log_probs: Literal["sum", "mean"] = "sum"
    """``sum`` over a response's tokens as the reference code does, or ``mean`` as TRL does."""


class SimPOLoss(Section):
    """Simple preference optimisation: mean log-probabilities, no reference."""

    needs_reference: ClassVar[bool] = False
    name: Literal["simpo"] = "simpo"
    """Which loss."""
    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-probability; the paper uses 2 to 2.5."""
    gamma: float = Field(0.5, ge=0)
    """Margin between the two rewards; the paper uses 0.3 to 1.6."""


class ORPOLoss(Section):
    """Odds-ratio preference optimisation: SFT and preference in one, no reference."""

    needs_reference: ClassVar[bool] = False
    name: Literal["orpo"] = "orpo"
    """Which loss."""
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio, the paper's lambda."""


AnyLoss = Annotated[
    SFTLoss | DPOLoss | RobustLoss | HingeLoss | IPOLoss | SimPOLoss | ORPOLoss,
    Field(discriminator="name"),
]
"""The loss section; ``name`` selects the class."""
