"""Which examples each optimiser step sees: a seeded order, nothing dropped, resumable.

An epoch is a permutation of all pairs, seeded by (seed, epoch). The last batch of an epoch may be
smaller than the others; it is trained on too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dpo.data.schema import Pair

_EVALUATION_STREAM = 1_000_003
_WEIGHT_STREAM = 1_000_033


def weighted(pairs: Sequence[Pair], weights: Mapping[str, float], seed: int) -> list[int]:
    """Indices of ``pairs``, each as often as it comes in an epoch, sorted.

    With weight w a source's pairs come floor(w) times each; a seeded choice of them, as many as the
    rest of w asks for, comes once more.
    """
    found: list[int] = []
    for number, name in enumerate(sorted({pair.dataset for pair in pairs})):
        indices = np.flatnonzero([pair.dataset == name for pair in pairs])
        weight = weights.get(name, 1.0)
        n_more = round((weight % 1) * len(indices))
        generator = np.random.default_rng([seed, _WEIGHT_STREAM, number])
        found += np.repeat(indices, int(weight)).tolist()
        found += generator.choice(indices, n_more, replace=False).tolist()
    return sorted(found)


@dataclass(frozen=True)
class LoaderState:
    """Where an iterator stands; JSON by ``asdict``."""

    epoch: int = 0
    position: int = 0
    """Pairs of this epoch that were given out."""
    examples: int = 0
    """Pairs given out since the start."""

    def as_json(self) -> dict[str, int]:
        """Plain values; ``LoaderState(**values)`` restores it."""
        return asdict(self)


@dataclass(frozen=True)
class Order:
    """The order in which a run sees its training pairs."""

    n_pairs: int
    batch_size: int
    n_epochs: int | None
    n_examples: int | None
    seed: int

    @property
    def total_examples(self) -> int:
        """Examples of the whole run."""
        by_epochs = None if self.n_epochs is None else self.n_pairs * self.n_epochs
        bounds = [bound for bound in (by_epochs, self.n_examples) if bound is not None]
        return min(bounds)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_from(LoaderState())

    def steps_from(self, state: LoaderState) -> int:
        """Optimiser steps that ``batches`` gives from ``state`` on."""
        left = self.total_examples - state.examples
        in_epoch = min(left, self.n_pairs - state.position)
        full_epochs, rest = divmod(left - in_epoch, self.n_pairs)
        steps_an_epoch = self._steps(self.n_pairs)
        return self._steps(in_epoch) + full_epochs * steps_an_epoch + self._steps(rest)

    def _steps(self, n_examples: int) -> int:
        return -(-n_examples // self.batch_size)

    def batches(self, state: LoaderState | None = None) -> Iterator[tuple[list[int], LoaderState]]:
        """(indices of one optimiser step, state after it), from ``state`` on."""
        state = state or LoaderState()
        while state.examples < self.total_examples:
            permutation = self._permutation(state.epoch)
            size = min(
                self.batch_size,
                self.n_pairs - state.position,
                self.total_examples - state.examples,
            )
            indices = permutation[state.position : state.position + size]
            position, examples = state.position + size, state.examples + size
            if position == self.n_pairs:
                state = LoaderState(state.epoch + 1, 0, examples)
            else:
                state = LoaderState(state.epoch, position, examples)
            yield indices, state

    def indices(self) -> list[int]:
        """Every index that the run sees, sorted."""
        if self.total_examples >= self.n_pairs:
            return list(range(self.n_pairs))
        return sorted(self._permutation(0)[: self.total_examples])

    def _permutation(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([self.seed, epoch])
        return [int(index) for index in generator.permutation(self.n_pairs)]


def evaluation_indices(n_pairs: int, n_eval_examples: int | None, seed: int) -> list[int]:
    """A seeded choice of held-out pairs, sorted; all of them when there are not more."""
    if n_eval_examples is None or n_eval_examples >= n_pairs:
        return list(range(n_pairs))
    generator = np.random.default_rng([seed, _EVALUATION_STREAM])
    chosen = generator.choice(n_pairs, n_eval_examples, replace=False)
    return sorted(int(index) for index in chosen)
