"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.data.tokenize import TokenizedExample
from dpo.storage.progress import message, track
from dpo.train.data import Examples
from dpo.train.log import MetricLog
from dpo.train.optimizer import build_optimizer, learning_rate
from dpo.train.step import Objective, check_finite, check_starting_point, clip_gradients

NLL_PER_TOKEN = "nll_train/per_token"
_COLLAPSE_SHARE = 0.2
"""A chosen log-prob that fell by more than this share of its start is called out."""


@dataclass
class Trainer:
    """Trains a model on examples; ``run`` reads top to bottom."""

    config: RunConfig
    stage: str
    objective: Objective
    examples: Examples
    reference: dict[str, PairLogProbs] | None
    """Log-probabilities of the reference by pair id; None where the loss needs none."""
    log: MetricLog
    steps: int = 0
    trained: int = 0
    """Examples so far."""
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.objective.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, self.config)

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: a loss or gradient that is not finite, or a wrong starting point.
        """
        order = self.examples.order
        started = time.monotonic()
        with track(self.stage, "steps", order.total_steps) as bar:
            if self.config.do_first_eval:
                self._evaluate()
            for indices, _ in order.batches():
                figures = self.train_step([self.examples.train[index] for index in indices])
                pace = self.trained / (time.monotonic() - started)
                bar.advance(1, **self._shown(figures), pairs_per_second=pace)
                if self._evaluation_is_due(len(indices)):
                    self._evaluate()
            if self.config.do_last_eval:
                self._evaluate()
        self._call_out_collapse()

    def train_step(
        self, examples: Sequence[TokenizedExample], *, n_micro_batches: int | None = None
    ) -> dict[str, float]:
        """One optimiser step on ``examples``; returns the means of its figures."""
        began = time.monotonic()
        rate = learning_rate(self.config, self.steps, self.examples.order.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures = self.objective.accumulate(
            examples,
            self._reference_of(examples),
            n_micro_batches or self.config.gradient_accumulation_steps,
        )
        grad_norm = clip_gradients(self.parameters, self.config.max_grad_norm)
        check_finite(figures, grad_norm, examples)
        if self.steps == 0:
            check_starting_point(figures, self.objective.loss, self.objective.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.trained += len(examples)
        means = {name: float(values.double().mean()) for name, values in figures.items()}
        if isinstance(self.objective.loss, SFTLoss):
            # the loss is summed over tokens, so between batches it follows their lengths
            n_tokens = sum(len(response) for e in examples for response in e.responses)
            means[NLL_PER_TOKEN] = means["loss/train"] * len(examples) / n_tokens
        seconds = time.monotonic() - began
        self.log.write(
            {
                "counters/updates": self.steps,
                "counters/examples": self.trained,
                **means,
                "grad_norm": grad_norm,
                "lr": rate,
                "examples_per_second": len(examples) / seconds,
            }
        )
        self.first = self.first or means
        self.last = means
        return {**means, "grad_norm": grad_norm, "lr": rate}

    def _reference_of(self, examples: Sequence[TokenizedExample]) -> list[PairLogProbs] | None:
        if self.reference is None:
            return None
        return [self.reference[example.pair_id] for example in examples]

    def _evaluation_is_due(self, just_trained: int) -> bool:
        every = self.config.eval_every
        if not every or self.trained >= self.examples.order.total_examples:
            return False
        return self.trained // every > (self.trained - just_trained) // every

    def _evaluate(self) -> None:
        held_out = self.examples.held_out
        if not held_out:
            return
        figures = self.objective.evaluate(held_out, self._reference_of(held_out))
        self.evaluation = figures
        self.log.write(
            {"counters/updates": self.steps, "counters/examples": self.trained, **figures}
        )

    def _shown(self, figures: dict[str, float]) -> dict[str, float]:
        shown = {"loss": figures["loss/train"]}
        if not isinstance(self.objective.loss, SFTLoss):
            shown["accuracy"] = figures["rewards_train/accuracies"]
            shown["margin"] = figures["rewards_train/margins"]
        return shown

    def _call_out_collapse(self) -> None:
        """DPO can lower both responses' probability; the loss does not show it."""
        if not self.objective.loss.needs_reference or not self.last:
            return
        loss = self.objective.loss
        assert not isinstance(loss, SFTLoss)
        change = self.last["rewards_train/chosen"] / loss.beta
        start = self.last["logps_train/chosen"] - change
        if change < _COLLAPSE_SHARE * start:
            message(
                self.stage,
                f"the chosen responses became less likely: their log-prob fell from {start:.1f} to "
                f"{start + change:.1f}; raise beta, or lower lr",
            )


def best_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checkpoint_activations(model: Any, mode: str) -> None:
    """Recompute the activations of every block (``full``) or of every second one in backward."""
    if mode == "none":
        return
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    for number, block in enumerate(_blocks(model)):
        if mode == "full" or number % 2 == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _blocks(model: Any) -> list[Any]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
