"""The invariant of the first step: before it, policy and reference are the same model."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo.config.losses import AnyLoss, SFTLoss
from dpo.config.models import ModelConfig
from dpo.errors import InvariantError
from dpo.modeling.losses import starting_loss
from dpo.modeling.precision import name_of

_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
"""Largest |h| at step 0 as a share of the responses' summed log-probabilities."""


def check_starting_point(
    figures: dict[str, Tensor], loss: AnyLoss, dtype: torch.dtype, scored_in: str = ""
) -> float:
    """Before the first update policy and reference are equal: the margin is 0, the loss known.

    A mask, a packing or a cache that is wrong shows here.

    Args:
        figures: Of the first batch.
        loss: Of the preference stage.
        dtype: Type of this training's products.
        scored_in: Type of those behind the reference; empty where it is not known.

    Returns:
        The largest log-ratio, if it is more than the rounding of float32 sums: the reference was
        scored in other types, or by a model that was split otherwise. Else 0.

    Raises:
        InvariantError: they differ by more than the precision in use explains.
    """
    if isinstance(loss, SFTLoss) or not loss.needs_reference:
        return 0.0
    largest = max(figures[f"logps_train/{side}"].abs().max() for side in ("chosen", "rejected"))
    tolerance = _TOLERANCE[dtype] * float(largest) + _TOLERANCE[dtype]
    margin = float(figures["rewards_train/margins"].abs().max()) / loss.beta
    if margin > tolerance:
        raise InvariantError(
            f"policy and reference differ before training: a log-ratio of {margin:.4g} where 0 "
            f"is expected (tolerance {tolerance:.2g})",
            where="step 0",
            fix=_how_to_mend(name_of(dtype), scored_in),
        )
    seen = margin if margin > _TOLERANCE[torch.float32] * (float(largest) + 1) else 0.0
    expected = starting_loss(loss)
    if expected is None:
        return seen
    found = float(figures["loss/train"].mean())
    drifted = [starting_loss(loss, drift) for drift in (-tolerance, tolerance)]
    allowed = max(abs(value - expected) for value in drifted if value is not None)
    if abs(found - expected) > allowed + 1e-5:
        raise InvariantError(
            f"the loss before training is {found:.6f}, expected {expected:.6f}",
            where="step 0",
            fix="report a bug: the loss does not see what it should",
        )
    return seen


def _how_to_mend(dtype: str, scored_in: str) -> str:
    # of 16 bits the tolerance has room for the difference between types
    if scored_in in ("", dtype) or dtype != "float32":
        return "the reference was computed with other weights, tokens or types: run it again"
    return (
        f"the reference was computed with products in {scored_in}, this training has {dtype} "
        "(model.compute_dtype=auto takes what a device is fast with): set model.compute_dtype for "
        "both, or run the reference on such a machine; where model.reference_dtype is another type "
        "than model.policy_dtype, make them one"
    )


def rounded_otherwise(largest: float, model: ModelConfig) -> str:
    """What to say of a start that is right within the precision in use, and not to float32 sums."""
    why = ""
    if model.policy_dtype != model.reference_dtype:
        why = (
            f" (model.policy_dtype={model.policy_dtype}, model.reference_dtype="
            f"{model.reference_dtype}: with one type for both it is rounded alike)"
        )
    return (
        f"the reference was rounded otherwise{why}: log-ratios of up to {largest:.2g} before the "
        "first update, where 0 is meant; accuracies say nothing while the margins are no larger "
        "than beta times that"
    )
