"""One optimiser step: forward and backward over micro-batches, checks, clipping, update.

Axes: E examples of a row, R responses of an example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo.config.losses import AnyLoss, SFTLoss
from dpo.data.log_probs import PairLogProbs
from dpo.data.packing import PackedBatch, pack
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.heartbeat import arrived
from dpo.errors import NonFiniteError
from dpo.modeling.lanes import (
    balanced,
    has_weights_of,
    replica_of,
    side_by_side,
    take_gradients,
    work_of,
)
from dpo.modeling.losses import PairLogps, as_used, preference_loss, sft_loss
from dpo.modeling.metrics import Split, preference_metrics, sft_metrics
from dpo.modeling.precision import autocast
from dpo.modeling.rows import prefetch, sent
from dpo.modeling.scoring import response_lengths, response_sums
from dpo.modeling.sharded import Scorer
from dpo.train.parallel import Ranks

_CLIP_EPSILON = 1e-6
"""What torch adds to the norm before it divides by it."""


class Interrupted(Exception):
    """A process was asked to stop, and all of them left an evaluation."""


@dataclass
class Objective:
    """The loss of a model on examples, with what it needs beside the model."""

    model: Any
    loss: AnyLoss
    dtype: torch.dtype
    """Type of matrix products."""
    token_budget: int
    packed: bool | None = None
    """Which forward path; None chooses by architecture."""
    scorer: Any = None
    """``Scorer`` around the model, sharded where there are several processes."""
    ranks: Ranks = field(default_factory=Ranks)
    lanes: int = 1
    """Rows that are worked on at once; see ``dpo.modeling.lanes``."""
    scored_in: str = ""
    """Type of the products behind the reference's values; empty where it is not known."""

    def __post_init__(self) -> None:
        self.scorer = self.scorer or Scorer(self.model)
        self._work = work_of(self.model)
        self._others: list[Objective] = []

    def figures(
        self,
        batch: PackedBatch,
        reference: Sequence[PairLogProbs] | None,
        split: Split,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each example [E] with gradients, and every figure of each example [E]."""
        # all processes make each pass: one that hangs before it is the one that is behind
        arrived()
        log_probs_N = self.scorer(batch, self.dtype, self.packed)
        logps_ER = response_sums(batch, log_probs_N)
        if isinstance(self.loss, SFTLoss):
            losses_E = sft_loss(logps_ER[:, 0])
            return losses_E, sft_metrics(logps_ER[:, 0], losses_E, split)
        lengths_ER = response_lengths(batch, logps_ER.device)
        if reference is None:
            reference_ER = torch.zeros_like(logps_ER)
        else:
            # summed in the same way as the policy's: equal models differ by exactly nothing
            reference_N = np.concatenate(
                [part for row in reference for part in (row.chosen, row.rejected)]
            )
            reference_ER = response_sums(batch, sent(reference_N, log_probs_N.device))
        columns = (matrix[:, r] for matrix in (logps_ER, reference_ER, lengths_ER) for r in (0, 1))
        logps = PairLogps(*columns)
        losses_E = preference_loss(self.loss, logps)
        used = as_used(self.loss, logps)
        return losses_E, preference_metrics(used, losses_E, self.loss.beta, split)

    def accumulate(
        self,
        examples: Sequence[TokenizedExample],
        reference: Sequence[PairLogProbs] | None,
        n_micro_batches: int,
        loss_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss over ``examples``; figures of each example, in their order.

        Every process takes its share of the examples, and splits it into micro-batches and those
        into rows. How changes nothing but the order of float32 sums: every row's loss is divided by
        the number of all examples. Gradients are ``loss_scale`` times too large.
        """
        rows = self._rows(examples, reference, n_micro_batches)
        prefetch((row.batch for lane in rows for row in lane), self.device)
        # processes average their gradients
        scale = self.ranks.world / len(examples)

        def backward(objective: Objective, row: _Row) -> dict[str, Tensor]:
            losses_E, figures = objective.figures(row.batch, row.reference, "train")
            (losses_E.sum() * (scale * row.weight * loss_scale)).backward()
            return figures

        figures = self._of_all(rows, backward)
        for other in self._others:
            take_gradients(self.model, other.model)
        return figures

    def evaluate(
        self,
        examples: Sequence[TokenizedExample],
        reference: Sequence[PairLogProbs] | None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float]:
        """Mean of every figure over ``examples``, however few they are.

        Args:
            examples: What to measure on.
            reference: As for ``figures``.
            asked_to_stop: Asked before each row; every process asks as often as the others.

        Raises:
            Interrupted: a process was asked to stop.
        """

        def forward(objective: Objective, row: _Row) -> dict[str, Tensor]:
            if self.ranks.any(asked_to_stop()):
                raise Interrupted
            with torch.no_grad():
                return objective.figures(row.batch, row.reference, "eval")[1]

        figures = self._of_all(self._rows(examples, reference, 1), forward)
        return {name: float(values_E.double().mean()) for name, values_E in figures.items()}

    def _of_all(
        self, rows: list[list[_Row]], figures_of: Callable[[Objective, _Row], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Every figure of all examples [E], in their order; each lane goes through its rows."""

        def lane(work: tuple[Objective, list[_Row]]) -> _Collected:
            objective, own = work
            collected = _Collected()
            with autocast(self.dtype, self.device.type):
                for row in own:
                    collected.add(row, figures_of(objective, row))
            return collected

        return _Collected.of(side_by_side(lane, self._busy(rows))).gathered(self.ranks)

    def _busy(self, rows: list[list[_Row]]) -> list[tuple[Objective, list[_Row]]]:
        """Who works on which rows: this objective on the first lane's, a replica on each other's.

        No replica is made before it is needed, nor one kept whose model has got other weights.
        """
        self._others = [o for o in self._others if has_weights_of(o.model, self.model)]
        busy = [lane for lane in rows if lane] or rows[:1]
        while len(self._others) < len(busy) - 1:
            self._others.append(replace(self, model=replica_of(self.model), scorer=None))
        return list(zip([self, *self._others], busy, strict=False))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def _rows(
        self,
        examples: Sequence[TokenizedExample],
        reference: Sequence[PairLogProbs] | None,
        n_micro_batches: int,
    ) -> list[list[_Row]]:
        """The rows of this process, of each lane.

        Every process makes the same number of passes, for each pass gathers weights from all: one
        that has fewer rows repeats a row with weight 0. (Several processes have one lane each.)
        """
        own = self.ranks.share(examples)
        rows: list[list[_Row]] = [[] for _ in range(self.lanes)]
        # all lanes together hold what one would
        budget = self.token_budget // self.lanes
        size = -(-max(len(own), 1) // n_micro_batches)
        for first in range(0, len(own), size):
            part = own[first : first + size]
            shares = balanced([self._work(examples[i]) for i in part], self.lanes)
            for lane, share in zip(rows, shares, strict=True):
                indices = [part[k] for k in share]
                for batch in pack([examples[i] for i in indices], budget):
                    lane.append(
                        _row(batch, [indices[local] for local in batch.examples], reference)
                    )
        most = max(self.ranks.gather(len(rows[0])))
        if len(rows[0]) < most:
            (batch, *_) = pack([examples[0]], self.token_budget)
            idle = replace(_row(batch, [0], reference), weight=0.0)
            rows[0] += [idle] * (most - len(rows[0]))
        return rows


@dataclass(frozen=True)
class _Row:
    """A packed row, and which of the step's examples are in it."""

    batch: PackedBatch
    indices: list[int]
    reference: list[PairLogProbs] | None
    weight: float = 1.0


def _row(batch: PackedBatch, indices: list[int], reference: Sequence[PairLogProbs] | None) -> _Row:
    return _Row(batch, indices, None if reference is None else [reference[i] for i in indices])


class _Collected:
    """Figures by example, from all rows of all processes."""

    def __init__(self) -> None:
        self._indices: list[int] = []
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, row: _Row, figures: dict[str, Tensor]) -> None:
        """The figures of one row; those of a repeated row do not count."""
        if not row.weight:
            return
        self._indices += row.indices
        for name, values_E in figures.items():
            self._parts[name].append(values_E)

    @classmethod
    def of(cls, lanes: Sequence[_Collected]) -> _Collected:
        """Those of all lanes."""
        found = cls()
        for lane in lanes:
            found._indices += lane._indices
            for name, parts in lane._parts.items():
                found._parts[name] += parts
        return found

    def gathered(self, ranks: Ranks) -> dict[str, Tensor]:
        """Every figure of all examples [E], in their order."""
        own = {name: torch.cat(parts).cpu() for name, parts in self._parts.items()}
        everyone = ranks.gather((self._indices, own))
        order = torch.tensor([index for indices, _ in everyone for index in indices]).argsort()
        names = next(figures for _, figures in everyone if figures)
        return {
            name: torch.cat([figures[name] for _, figures in everyone if figures])[order]
            for name in names
        }


def check_finite(
    figures: dict[str, Tensor], grad_norm: float, examples: Sequence[TokenizedExample]
) -> None:
    """Stop before an update that would spoil the weights.

    Raises:
        NonFiniteError: NaN or infinity in a loss or in the gradient; names the pairs.
    """
    bad = [
        example.pair_id
        for example, loss in zip(examples, figures["loss/train"].tolist(), strict=True)
        if not np.isfinite(loss)
    ]
    if not bad and np.isfinite(grad_norm):
        return
    what = "the loss" if bad else "the gradient"
    named = ", ".join((bad or [example.pair_id for example in examples])[:8])
    raise NonFiniteError(
        f"{what} is not finite; the model was not updated",
        where=f"pairs {named}",
        fix="lower lr or max_grad_norm, use float32, or look at these pairs",
    )


def check_weights(parameters: Sequence[torch.nn.Parameter], steps: int) -> None:
    """After updates: a step too large ruins weights, and shows in no figure before the next one.

    Raises:
        NonFiniteError: NaN or infinity in a weight.
    """
    weights = [weight.detach() for weight in parameters]
    norm = _number(torch.nn.utils.get_total_norm(weights, foreach=True))
    if not np.isfinite(norm):
        raise NonFiniteError(
            "the weights are not finite; they are not kept",
            where=f"after step {steps}",
            fix="lower lr, or raise warmup_steps; checkpoints before are as they were"
            if steps
            else "the weights that training begins with hold NaN or infinity: take others",
        )


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to ``max_norm``; returns their L2 norm before."""
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    value = _number(norm)
    # torch would pass over all gradients to multiply them by 1
    if not value + _CLIP_EPSILON <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return value


def _number(norm: Tensor) -> float:
    # of sharded parameters it is a DTensor
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
