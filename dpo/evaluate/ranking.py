"""In what order evaluations stand, in a sweep and in a comparison alike. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.evaluate.numbers import finite


def ranks(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """What each is ranked by, the larger the better: reward accuracy, then what decides ties.

    That is the preference loss where all were measured with one loss of equal settings, else the
    area under the ROC curve of the rewards, which has no scale; a margin would grow with beta. What
    has no finite figure comes last.
    """
    one_loss = all(found.get("loss") == evaluations[0].get("loss") for found in evaluations)
    tie = ("after", "loss") if one_loss else ("calibration", "auc")
    sign = -1 if one_loss else 1

    def rank(found: Mapping[str, Any]) -> tuple[float, float]:
        accuracy = finite(found, "after", "reward_accuracy", "value")
        decides = finite(found, *tie, "value")
        return (
            -math.inf if accuracy is None else accuracy,
            -math.inf if decides is None else sign * decides,
        )

    return [rank(found) for found in evaluations]
