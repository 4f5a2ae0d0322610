"""A packed row on the device of the model: sent once, ahead of its use, and of a fixed length.

Axes: T tokens of a row, N response tokens, K gathered keys, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.data.packing import PackedBatch, Segment
from dpo.modeling.varlen import VarlenLayout, varlen_layout

_KEPT = "_dpo_row_tensors"


@dataclass(frozen=True)
class RowTensors:
    """The arrays of a row as tensors."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    predictor_N: Tensor
    target_N: Tensor
    slot_N: Tensor
    layout: VarlenLayout
    key_index_K: Tensor
    query_ends_S: Tensor
    """From 0 on, int32."""
    key_ends_S: Tensor


def row_tensors(row: PackedBatch, device: torch.device) -> RowTensors:
    """The tensors of ``row``; made and sent the first time they are asked for."""
    kept: dict[torch.device, RowTensors] = row.__dict__.setdefault(_KEPT, {})
    if device not in kept:
        layout = varlen_layout(row.segments)
        kept[device] = RowTensors(
            input_ids_T=sent(row.input_ids_T, device),
            position_ids_T=sent(row.position_ids_T, device),
            predictor_N=sent(row.predictor_N, device),
            target_N=sent(row.target_N, device),
            slot_N=sent(row.slot_N, device),
            layout=layout,
            key_index_K=sent(np.asarray(layout.keys, dtype=np.int64), device),
            query_ends_S=sent(np.asarray((0, *layout.query_ends), dtype=np.int32), device),
            key_ends_S=sent(np.asarray((0, *layout.key_ends), dtype=np.int32), device),
        )
    return kept[device]


def prefetch(rows: Iterable[PackedBatch], device: torch.device) -> None:
    """Send the rows of a step ahead: the copies run while the device still works on others."""
    if device.type != "cpu":
        for row in rows:
            row_tensors(row, device)


def sent(values: npt.NDArray[np.number[Any]], device: torch.device) -> Tensor:
    """``values`` on ``device``, without waiting for what a GPU is working on."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    # from pinned memory a copy does not wait for the device
    return tensor.pin_memory().to(device, non_blocking=True)


def padded(row: PackedBatch, multiple: int) -> PackedBatch:
    """The row with tokens added up to a multiple of ``multiple``, as an example of their own.

    Nothing predicts or is predicted there. Compiled blocks see few lengths that way.
    """
    more = -row.n_tokens % multiple
    if not more:
        return row
    end = row.n_tokens + more
    return replace(
        row,
        segments=(*row.segments, Segment(row.n_tokens, end, ())),
        input_ids_T=np.concatenate([row.input_ids_T, np.zeros(more, dtype=np.int64)]),
        position_ids_T=np.concatenate([row.position_ids_T, np.arange(more, dtype=np.int64)]),
    )
