"""Packs examples into rows in which each prompt stands once.

An example is laid out as ``prompt | response 0 | response 1``. Every response attends to the prompt
and to itself, never to the other response or to a neighbour in the row, and its positions continue
from the end of the prompt. So a prompt is computed once for both responses: for HH dialogues that
saves a third of the tokens beside separate sequences, and padding is gone altogether.

Axes: T tokens of a row, N response tokens of a row, E examples, R responses of an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.data.tokenize import TokenizedExample

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """Where one example lies in a row."""

    start: int
    """First token of the prompt."""
    prompt_end: int
    """One past its last token; response 0 begins here."""
    response_ends: tuple[int, ...]
    """One past the last token of each response; the next one begins there. Padding has none."""

    @property
    def response_spans(self) -> list[tuple[int, int]]:
        """First token and one past the last, of each response."""
        starts = (self.prompt_end, *self.response_ends)[: len(self.response_ends)]
        return list(zip(starts, self.response_ends, strict=True))


@dataclass(frozen=True)
class PackedBatch:
    """One row of packed examples, ready for a model."""

    examples: tuple[int, ...]
    """Index of each example in the list that was packed."""
    pair_ids: tuple[str, ...]
    segments: tuple[Segment, ...]
    input_ids_T: Array
    position_ids_T: Array
    predictor_N: Array
    """Position whose hidden state predicts each response token."""
    target_N: Array
    """The response tokens."""
    slot_N: Array
    """``example * n_responses + response`` of each response token, example counted in this row."""
    n_responses: int

    @property
    def n_tokens(self) -> int:
        """Length of the row."""
        return len(self.input_ids_T)


def pack(examples: Sequence[TokenizedExample], token_budget: int) -> list[PackedBatch]:
    """Rows of at most ``token_budget`` tokens, filled first-fit with the longest example first.

    An example is never split: one that exceeds the budget has a row of its own. Every example is in
    exactly one row.
    """
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].n_tokens, i))
    rows: list[list[int]] = []
    free: list[int] = []
    for index in order:
        need = examples[index].n_tokens
        row = next((r for r, room in enumerate(free) if room >= need), None)
        if row is None:
            rows.append([])
            free.append(max(token_budget, need))
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= need
    return [_row(examples, sorted(row)) for row in rows]


def _row(examples: Sequence[TokenizedExample], chosen: Sequence[int]) -> PackedBatch:
    ids: list[Array] = []
    positions: list[Array] = []
    predictors: list[Array] = []
    targets: list[Array] = []
    slots: list[Array] = []
    segments = []
    offset = 0
    n_responses = len(examples[chosen[0]].responses)
    for local, index in enumerate(chosen):
        example = examples[index]
        prompt_length = len(example.prompt_T)
        start, offset = offset, offset + prompt_length
        ids.append(example.prompt_T.astype(np.int64))
        positions.append(np.arange(prompt_length, dtype=np.int64))
        ends = []
        for number, response_T in enumerate(example.responses):
            length = len(response_T)
            ids.append(response_T.astype(np.int64))
            positions.append(np.arange(prompt_length, prompt_length + length, dtype=np.int64))
            # the first token is predicted by the prompt's last, the others by the one before
            own = np.arange(offset - 1, offset + length - 1, dtype=np.int64)
            own[:1] = start + prompt_length - 1
            predictors.append(own)
            targets.append(response_T.astype(np.int64))
            slots.append(np.full(length, local * n_responses + number, dtype=np.int64))
            offset += length
            ends.append(offset)
        segments.append(Segment(start, start + prompt_length, tuple(ends)))
    return PackedBatch(
        examples=tuple(chosen),
        pair_ids=tuple(examples[index].pair_id for index in chosen),
        segments=tuple(segments),
        input_ids_T=np.concatenate(ids),
        position_ids_T=np.concatenate(positions),
        predictor_N=np.concatenate(predictors),
        target_N=np.concatenate(targets),
        slot_N=np.concatenate(slots),
        n_responses=n_responses,
    )
