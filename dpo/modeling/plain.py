"""The path of models without a packed one: every response in a sequence of its own.

Sequences are padded on the right. What padding does to a model is not known for all of
transformers, so the first batch is checked: the shortest sequence by itself must give the same
values. Where it does not, sequences run one by one. The same check finds models that are not
causal.

Axes: S sequences, L their length, N response tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dpo.data.packing import PackedBatch
from dpo.errors import ModelError
from dpo.modeling.attention import same_rotation_up_to
from dpo.modeling.load import context_of
from dpo.modeling.rows import sent

_log = logging.getLogger(__name__)
_warned: set[str] = set()
_PADS = "_dpo_padding_is_safe"
_LEAST_PADDING = 8
"""Tokens that the check pads the shortest sequence by, where the others are not longer still."""
_ROUGH = 5e-2
"""By how much bfloat16 products differ, as a share of the largest logit."""


def warn_once(model_type: str) -> None:
    """One warning for each kind of model in a process."""
    if model_type not in _warned:
        _warned.add(model_type)
        _log.warning("%s models run without shared prompts: correct, but slower", model_type)


def plain_log_probs(model: Any, batch: PackedBatch) -> Tensor:
    """Log-probability of every response token; float32 at least, shape [N], with gradients.

    Raises:
        ModelError: the model is not causal, or cannot be padded and is spread over processes.
    """
    rows, spans = _sequences(batch)
    apart = _rotated_by_the_longest(model, rows)
    if not apart and not hasattr(model, _PADS):
        setattr(model, _PADS, _padding_is_safe(model, rows))
    numbers = range(len(rows))
    together = not apart and getattr(model, _PADS)
    parts = []
    for group in [list(numbers)] if together else [[number] for number in numbers]:
        ids_SL = _padded([rows[number] for number in group], model.device)
        logits_SLV = _unmasked_logits(model, ids_SL)
        parts += [
            _log_probs(logits_LV, ids_L, *spans[number])
            for number, logits_LV, ids_L in zip(group, logits_SLV, ids_SL, strict=True)
        ]
    return torch.cat(parts)


def _rotated_by_the_longest(model: Any, rows: list[list[int]]) -> bool:
    """Whether padding would give the shorter sequences the positions of the longest.

    Raises:
        ModelError: it would, and the model is spread over processes.
    """
    limit, lengths = same_rotation_up_to(model.config), [len(row) for row in rows]
    if max(lengths) <= limit:
        return False
    _refuse_several_processes(model)
    return min(lengths) <= limit


def _refuse_several_processes(model: Any) -> None:
    # each process would take another number of forward passes
    if dist.is_initialized():
        raise ModelError(
            f"{model.config.model_type} models give other values with padding, and cannot be "
            "spread over processes here",
            where="trainer",
            fix="use trainer=BasicTrainer",
        )


def _sequences(batch: PackedBatch) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Token ids of prompt + response, and the response's span in it, in the order of ``slot_N``."""
    rows, spans = [], []
    for segment in batch.segments:
        prompt = batch.input_ids_T[segment.start : segment.prompt_end].tolist()
        for first, last in segment.response_spans:
            response = batch.input_ids_T[first:last].tolist()
            rows.append(prompt + response)
            spans.append((len(prompt), len(prompt) + len(response)))
    return rows, spans


def _padded(rows: list[list[int]], device: torch.device, at_least: int = 0) -> Tensor:
    """Token ids of the sequences, sent at once; shape [S, L] with L of ``at_least``."""
    ids_SL = np.zeros((len(rows), max(at_least, *map(len, rows))), dtype=np.int64)
    for number, ids in enumerate(rows):
        ids_SL[number, : len(ids)] = ids
    return sent(ids_SL, device)


def _unmasked_logits(model: Any, ids_SL: Tensor) -> Tensor:
    # no token sees the padding after it, and padding that sees only padding (a window of it) gives
    # NaN, which reaches every token of its sequence in the next layer
    mask_SL = torch.ones_like(ids_SL)
    logits_SLV: Tensor = model(input_ids=ids_SL, attention_mask=mask_SL, use_cache=False).logits
    return logits_SLV


def _logits(model: Any, row: list[int]) -> Tensor:
    return _unmasked_logits(model, _padded([row], model.device))[0]


def _log_probs(logits_LV: Tensor, ids_L: Tensor, first: int, last: int) -> Tensor:
    wide = torch.promote_types(logits_LV.dtype, torch.float32)
    target_L = ids_L[first:last].to(logits_LV.device)
    log_probs_LV = logits_LV[first - 1 : last - 1].to(wide).log_softmax(1)
    return log_probs_LV.gather(1, target_L[:, None]).squeeze(1)


@torch.no_grad()
def _padding_is_safe(model: Any, rows: list[list[int]]) -> bool:
    """Whether a padded sequence gives what it gives by itself.

    Raises:
        ModelError: the model is not causal, or cannot be padded and is spread over processes.
    """
    shortest = min(range(len(rows)), key=lambda number: len(rows[number]))
    row = rows[shortest]
    if not _is_causal(model, row):
        raise ModelError(
            f"this {model.config.model_type} model is not causal: a token changes the "
            "predictions of those before it",
            where="model.name_or_path",
            fix="use a causal language model (for some, is_decoder=true in their config.json)",
        )
    alone_LV = _logits(model, row)
    padded_SLV = _unmasked_logits(model, _padded(rows, model.device, _tried(model, len(row))))
    safe = bool(torch.isfinite(padded_SLV).all()) and _close(
        padded_SLV[shortest, : len(row)], alone_LV
    )
    if not safe:
        _refuse_several_processes(model)
    return safe


def _tried(model: Any, shortest: int) -> int:
    """The length to which the check pads: rows of one length alone would try nothing."""
    longest = min(context_of(model.config) or math.inf, same_rotation_up_to(model.config))
    return int(min(shortest + _LEAST_PADDING, max(longest, shortest)))


def _is_causal(model: Any, row: list[int]) -> bool:
    """Whether other tokens in the second half of ``row`` change nothing in the first.

    How much a token sees of those after it may be as little as 1e-4 of the largest logit. Nothing
    is padded: passes of one shape are equal to the bit, whatever their type, but where a GPU adds
    in an order of its own, which the same pass taken twice shows; and where experts are handed
    other tokens at once, which rounding differently may choose others in the layers above.
    """
    half = len(row) // 2
    n_vocabulary = model.get_input_embeddings().weight.shape[0]
    changed = [*row[:half], *((token + 1) % n_vocabulary for token in row[half:])]
    # also for a row of one token: where a model is in shards, each process takes as many passes
    with torch.autocast(model.device.type, enabled=False):
        found_LV, again_LV, alone_LV = (
            _logits(model, ids)[:half].double() for ids in (changed, row, row)
        )
    if not half:
        return True
    noise = float((again_LV - alone_LV).abs().max() / (alone_LV.abs().max() + 1e-6))
    least = _ROUGH if has_experts(model) else 1e-5
    return _close(found_LV, alone_LV, max(least, 4 * noise))


def has_experts(model: Any) -> bool:
    """Whether some tokens take other weights than others."""
    return any(
        "expert" in f"{name} {type(module).__name__}".lower()
        for name, module in model.named_modules()
    )


def _close(left: Tensor, right: Tensor, tolerance: float | None = None) -> bool:
    """Within what rounding in the products' type explains."""
    if not left.numel():
        return True
    error = (left.float() - right.float()).abs().max()
    scale = float(right.float().abs().max()) + 1e-6
    tolerance = tolerance or (_ROUGH if torch.is_autocast_enabled(left.device.type) else 1e-3)
    return bool(error <= tolerance * scale)
