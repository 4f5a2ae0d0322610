"""How far a run of training has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpo.data.loader import LoaderState, Order
from dpo.errors import ConfigError
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
    tokens: int = 0
    """Through the model at once; 0 in what an earlier version wrote."""
    compute_dtype: str = ""
    """Of products; empty in what an earlier version wrote."""
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

    def total_steps(self, order: Order) -> int:
        """Steps of the whole run: those done, by whatever batch size, and those that follow."""
        return self.steps + order.steps_from(self.loader)

    def check_within(self, order: Order, where: Path) -> None:
        """Refuse to go on where the run, or the data, ends before this (``resume=force``).

        Raises:
            ConfigError: it does.
        """
        trained, total = self.loader.examples, order.total_examples
        if trained > total:
            ends = f"this run ends after {total:,}"
        elif self.loader.position >= order.n_pairs:
            ends = f"{self.loader.position:,} of them in an epoch that has {order.n_pairs:,} here"
        else:
            return
        raise ConfigError(
            f"the checkpoint has trained on {trained:,} examples, and {ends}",
            where=str(where),
            fix="raise n_examples or n_epochs, give the data that it began with, choose another "
            "output, or set resume=never to remove the checkpoints and begin again",
        )

    def written_by(self, processes: int, tokens: int, compute_dtype: str) -> None:
        """Note on what the next steps' sums depend beside the tensors."""
        self.processes, self.tokens, self.compute_dtype = processes, tokens, compute_dtype
        self.threads = torch.get_num_threads()

    def other_rounding(self, processes: int, tokens: int, compute_dtype: str) -> str:
        """Why what follows is not what the run that wrote this would have done, to the bit; or
        nothing."""
        threads = torch.get_num_threads()
        if self.compute_dtype not in ("", compute_dtype):
            # by model.compute_dtype=auto each processor takes what it is fast with
            change = f"written with products in {self.compute_dtype}, now in {compute_dtype}"
        elif self.processes != processes:
            change = f"written by {self.processes} processes, now {processes}"
        elif self.tokens not in (0, tokens):
            change = f"written with {self.tokens:,} tokens at once, now {tokens:,}"
        elif not torch.cuda.is_available() and self.threads not in (0, threads):
            # sums over other parts, and other rows at once
            change = f"written with {self.threads} threads, now {threads}"
        else:
            return ""
        return f" ({change}: equal within rounding, not to the bit)"
