"""How far a run of training has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dpo.data.loader import LoaderState
from dpo.train.scaling import LossScale


@dataclass
class Position:
    """How far a run has come, beside its tensors."""

    steps: int = 0
    trained: int = 0
    loader: LoaderState = field(default_factory=LoaderState)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    evaluation_due: bool = False
    """It was asked to stop in an evaluation between two steps, which is made anew."""
    processes: int = 1
    """How many wrote it."""
    threads: int = 0
    """Of each of them, for work on a CPU; 0 in what an earlier version wrote."""
    seconds: float = 0.0
    """Time since the run began, without what was between an end and going on."""
    useful_seconds: float = 0.0
    """Of it, in optimiser steps."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """Used where products are float16."""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Position:
        """What ``dataclasses.asdict`` made of it."""
        scale = LossScale(**values.pop("loss_scale", {}))
        return cls(**{**values, "loader": LoaderState(**values["loader"])}, loss_scale=scale)
