"""The training loop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.together import barrier, is_first
from dpo.errors import DpoError, TrainingStopped
from dpo.modeling.generation import generate
from dpo.modeling.plain import has_experts
from dpo.modeling.precision import name_of
from dpo.modeling.repeatable import NOT_TO_THE_BIT, in_any_order, or_in_any_order, same_bits
from dpo.storage.progress import message, track
from dpo.train.checkpoint import Checkpoints
from dpo.train.data import Examples
from dpo.train.log import MetricLog
from dpo.train.optimizer import build_optimizer, learning_rate
from dpo.train.position import Position
from dpo.train.start import check_starting_point, rounded_otherwise
from dpo.train.step import (
    Interrupted,
    Objective,
    check_finite,
    check_weights,
    clip_gradients,
)

T = TypeVar("T")

NLL_PER_TOKEN = "nll_train/per_token"  # nosec B105
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
    tokenizer: Any = None
    checkpoints: Checkpoints | None = None
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self._asked_to_stop = False
        self._began_with = 0
        self.parameters = [p for p in self.objective.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, self.config)

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: a loss or gradient that is not finite, or a wrong starting point.
        """
        order = self.examples.order
        before, started = self.position.trained, time.monotonic()
        self._counted_at = started
        steps = track(self.stage, "steps", self.position.total_steps(order), self.position.steps)
        with self._polite_end(), same_bits(self._repeats()), steps as bar:
            bar.shortest_seconds = self.config.minimum_log_interval_secs
            begins = self.config.do_first_eval and not self.position.steps
            if begins or self.position.evaluation_due:
                self._evaluate()
            # what a checkpoint saves begins here
            self._saved_at = time.monotonic()
            for indices, loader in order.batches(self.position.loader):
                figures = self.train_step([self.examples.train[index] for index in indices])
                self.position.loader = loader
                pace = (self.position.trained - before) / (time.monotonic() - started)
                bar.advance(1, **self._shown(figures), pairs_per_second=pace)
                if self._due(self.config.eval_every, len(indices)):
                    self._evaluate()
                self._keep(len(indices))
            check_weights(self.parameters, self.position.steps)
            if self.config.do_last_eval:
                self._evaluate()
            if self.checkpoints:
                self.checkpoints.finish(strict=False)
        self._count_seconds()
        self._call_out_collapse()
        if order.total_steps:
            message(self.stage, f"{self.useful_share:.0%} of the time went into optimiser steps")

    def _repeats(self) -> bool:
        """Whether a GPU is to give the same bits each time; a CPU does."""
        if not self.config.deterministic or self.objective.device.type != "cuda":
            return False
        if not has_experts(self.objective.model):
            return True
        message(
            self.stage,
            f"a GPU counts the tokens of experts in no fixed order: {NOT_TO_THE_BIT}",
        )
        return False

    @property
    def useful_share(self) -> float:
        """Share of the time so far that went into optimiser steps, earlier attempts included."""
        return self.position.useful_seconds / max(self.position.seconds, 1e-9)

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.position.seconds += now - self._counted_at
        self._counted_at = now

    def go_on_from(self, path: Path) -> None:
        """Take up a checkpoint: weights, optimiser and position."""
        assert self.checkpoints is not None
        self.position = self.checkpoints.load(path, self.objective.model, self.optimizer)
        self._began_with = self.position.steps
        budget = self.objective.token_budget
        if self.config.micro_batch_tokens is None and self.position.tokens:
            # chosen for the device that it began on; other rows give other sums, but fewer GPUs or
            # smaller ones may not take them
            budget = self.objective.token_budget = min(budget, self.position.tokens)
        other = self.position.other_rounding(
            self.objective.ranks.processes, budget, name_of(self.objective.dtype)
        )
        message(self.stage, f"goes on after step {self.position.steps}, from {path.name}{other}")
        self.position.processes = self.objective.ranks.processes

    def _keep(self, just_trained: int) -> None:
        """Write a checkpoint where one is due; end where the process was asked to.

        Raises:
            TrainingStopped: SIGTERM came; a checkpoint was written where they are kept.
        """
        ranks = self.objective.ranks
        stop = ranks.any(self._asked_to_stop)
        done = self.position.trained >= self.examples.order.total_examples
        seconds = (
            self.checkpoints.period.seconds(self.config.checkpoint_seconds)
            if self.checkpoints
            else 0.0
        )
        late = bool(seconds) and time.monotonic() - self._saved_at > seconds
        due = self._due(self.config.checkpoint_every, just_trained) or ranks.any(late)
        if stop:
            self._stop()
        if self.checkpoints and due and not self.config.debug and not done:
            self._checkpoint(self.checkpoints)

    def _checkpoint(self, checkpoints: Checkpoints) -> None:
        check_weights(self.parameters, self.position.steps)
        self._count_seconds()
        objective = self.objective
        self.position.written_by(
            objective.ranks.processes, objective.token_budget, name_of(objective.dtype)
        )
        # whole lines: the checkpoint takes the log along
        texts = self.log.texts() if is_first() else {}
        checkpoints.save(self.objective.model, self.optimizer, self.position, texts)
        self._saved_at = time.monotonic()

    def _stop(self) -> NoReturn:
        """Keep what was trained, and end.

        Raises:
            TrainingStopped: always.
        """
        steps = self.position.steps
        after, kept, then = f"after step {steps}", "nothing was kept", "begins anew"
        if not steps:
            after, kept = "before its first step", "there was nothing to keep"
        elif self.checkpoints:
            # the one that it went on from is not put in its own place
            self.checkpoints.ending = True
            if steps != self._began_with:
                self._checkpoint(self.checkpoints)
            kept, then = "a checkpoint was written", "goes on from there"
            try:
                self.checkpoints.finish()
            except DpoError as error:
                kept = f"no checkpoint of it could be written: {error.found}"
                then = "goes on from the one before, if there is one"
            # the others are ended as soon as the first process has
            barrier()
        else:
            then += "; checkpoint_uri lets it go on"
        raise TrainingStopped(
            f"training was asked to stop {after}; {kept}",
            fix=f"run the same command again: it {then}",
        )

    @contextmanager
    def _polite_end(self) -> Iterator[None]:
        """SIGTERM ends training after the step, or the row of an evaluation, that is running."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: object) -> None:
            self._asked_to_stop = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def train_step(
        self, examples: Sequence[TokenizedExample], *, n_micro_batches: int | None = None
    ) -> dict[str, float]:
        """One optimiser step on ``examples``; returns the means of its figures."""
        began = time.monotonic()
        order = self.examples.order
        rate = learning_rate(self.config, self.position.steps, self.position.total_steps(order))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        figures, grad_norm = self._gradients(examples, n_micro_batches)
        check_finite(figures, grad_norm, examples)
        if self.position.steps == 0:
            apart = check_starting_point(
                figures, self.objective.loss, self.objective.dtype, self.objective.scored_in
            )
            if apart:
                message(self.stage, rounded_otherwise(apart, self.config.model))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.steps += 1
        self.position.trained += len(examples)
        means = {name: float(values.double().mean()) for name, values in figures.items()}
        if isinstance(self.objective.loss, SFTLoss):
            # the loss is summed over tokens, so between batches it follows their lengths
            n_tokens = sum(len(response) for e in examples for response in e.responses)
            means[NLL_PER_TOKEN] = means["loss/train"] * len(examples) / n_tokens
        seconds = time.monotonic() - began
        self.position.useful_seconds += seconds
        self.log.write(
            {
                "counters/updates": self.position.steps,
                "counters/examples": self.position.trained,
                **means,
                "grad_norm": grad_norm,
                "lr": rate,
                "examples_per_second": len(examples) / seconds,
            }
        )
        self.position.first = self.position.first or means
        self.position.last = means
        return {**means, "grad_norm": grad_norm, "lr": rate}

    def _gradients(
        self, examples: Sequence[TokenizedExample], n_micro_batches: int | None
    ) -> tuple[dict[str, Tensor], float]:
        """Clipped gradients of a step; figures of each example, and the norm before.

        In float16 losses are scaled, and a step that overflows is done again with a smaller scale.
        """
        scaled = self.objective.dtype == torch.float16
        scale = self.position.loss_scale
        while True:
            times = scale.value if scaled else 1.0
            figures = self._repeated(partial(self._accumulate, examples, n_micro_batches, times))
            if scaled:
                scale.unscale(self.parameters)
            norm = clip_gradients(self.parameters, self.config.max_grad_norm)
            lost = not torch.isfinite(figures["loss/train"]).all()
            if not scaled or lost or math.isfinite(norm):
                scale.went_well()
                return figures, norm
            if not scale.overflowed():
                return figures, norm

    def _accumulate(
        self, examples: Sequence[TokenizedExample], n_micro_batches: int | None, loss_scale: float
    ) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        return self.objective.accumulate(
            examples,
            self._reference_of(examples),
            n_micro_batches or self.config.gradient_accumulation_steps,
            loss_scale,
        )

    def _repeated(self, work: Callable[[], T]) -> T:
        return or_in_any_order(work, self.stage, alone=self.objective.ranks.processes == 1)

    def _reference_of(self, examples: Sequence[TokenizedExample]) -> list[PairLogProbs] | None:
        if self.reference is None:
            return None
        return [self.reference[example.pair_id] for example in examples]

    def _due(self, every: int, just_trained: int) -> bool:
        """Whether a multiple of ``every`` examples was passed in this step, before the end."""
        trained = self.position.trained
        if not every or trained >= self.examples.order.total_examples:
            return False
        return trained // every > (trained - just_trained) // every

    def _evaluate(self) -> None:
        held_out = self.examples.held_out
        if not held_out:
            return
        evaluate = partial(
            self.objective.evaluate,
            held_out,
            self._reference_of(held_out),
            lambda: self._asked_to_stop,
        )
        try:
            figures = self._repeated(evaluate)
            samples = self._samples() if self.config.sample_during_eval else []
        except Interrupted:
            # the last one is made in any case
            done = self.position.trained >= self.examples.order.total_examples
            self.position.evaluation_due = not done
            self._stop()
        self.position.evaluation_due = False
        if not math.isfinite(figures["loss/eval"]):
            check_weights(self.parameters, self.position.steps)
            message(self.stage, "the loss of the held-out pairs is not finite, the weights are")
        self.position.evaluation = figures
        self.log.write(
            {
                "counters/updates": self.position.steps,
                "counters/examples": self.position.trained,
                **figures,
            }
        )
        if samples and is_first():
            self.log.write_samples(samples)

    def _samples(self) -> list[dict[str, Any]]:
        """Answers to the first held-out prompts, for ``samples.jsonl`` beside the metric log.

        Raises:
            Interrupted: a process was asked to stop.
        """

        def between() -> None:
            if self.objective.ranks.any(self._asked_to_stop):
                raise Interrupted

        examples = self.examples.held_out[: self.config.n_eval_model_samples]
        prompts = [self.tokenizer.decode(example.prompt_T) for example in examples]
        # sums along the vocabulary have no kind that gives the same bits each time
        with in_any_order():
            answers = generate(
                self.objective.scorer,
                self.tokenizer,
                prompts,
                max_new_tokens=self.config.max_length - self.config.max_prompt_length,
                max_prompt_length=self.config.max_prompt_length,
                seed=self.config.seed,
                between=between,
            )
        return [
            {"step": self.position.steps, "prompt": prompt, "answer": answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _shown(self, figures: dict[str, float]) -> dict[str, float]:
        shown = {"loss": figures["loss/train"]}
        if not isinstance(self.objective.loss, SFTLoss):
            shown["accuracy"] = figures["rewards_train/accuracies"]
            shown["margin"] = figures["rewards_train/margins"]
        return shown

    def _call_out_collapse(self) -> None:
        """DPO can lower both responses' probability; the loss does not show it."""
        if not self.objective.loss.needs_reference or not self.position.last:
            return
        loss = self.objective.loss
        assert not isinstance(loss, SFTLoss)
        change = self.position.last["rewards_train/chosen"] / loss.beta
        start = self.position.last["logps_train/chosen"] - change
        if change < _COLLAPSE_SHARE * start:
            message(
                self.stage,
                f"the chosen responses became less likely: their log-prob fell from {start:.1f} to "
                f"{start + change:.1f}; raise beta, or lower lr",
            )
