"""Log-probabilities of responses under a model: the one forward pass of training and evaluation.

Two paths give the same values: rows packed with shared prompts (``attention.ARCHITECTURES``), and
separate padded sequences for every other causal model.

Axes: T tokens of a row, N response tokens, E examples, R responses, S sequences, L their length.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.data.packing import PackedBatch, pack
from dpo.data.tokenize import TokenizedExample
from dpo.modeling.attention import packed_attention, supports_packing
from dpo.modeling.head import token_log_probs_from_hidden
from dpo.modeling.precision import autocast
from dpo.storage.progress import Bar

NDArray = npt.NDArray[np.float32]
_warned: set[str] = set()


def token_log_probs(
    model: Any,
    batch: PackedBatch,
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool | None = None,
) -> Tensor:
    """Log-probability of every response token of a row; float32, shape [N], with gradients.

    Args:
        model: A causal language model of transformers.
        batch: The row.
        dtype: Type of the products of the output layer.
        packed: Which path; None takes the packed one where the architecture is known.
    """
    if packed is None:
        longest = int(batch.position_ids_T.max()) + 1
        packed = supports_packing(model.config, longest)
        if not packed:
            _warn_once(model.config.model_type)
    return _packed(model, batch, dtype) if packed else _padded(model, batch)


def response_sums(batch: PackedBatch, log_probs_N: Tensor) -> Tensor:
    """Sum over the tokens of each response; shape [E, R]."""
    slot_N = torch.as_tensor(batch.slot_N, device=log_probs_N.device)
    sums = log_probs_N.new_zeros(len(batch.examples) * batch.n_responses)
    return sums.index_add(0, slot_N, log_probs_N).view(-1, batch.n_responses)


def response_lengths(batch: PackedBatch, device: torch.device | None = None) -> Tensor:
    """Number of tokens of each response; shape [E, R]."""
    lengths = [[last - first for first, last in s.response_spans] for s in batch.segments]
    return torch.tensor(lengths, dtype=torch.float32, device=device)


def _packed(model: Any, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    device = model.device
    with packed_attention(model):
        hidden_TD = model.base_model(
            input_ids=torch.as_tensor(batch.input_ids_T, device=device)[None],
            position_ids=torch.as_tensor(batch.position_ids_T, device=device)[None],
            use_cache=False,
            segments=batch.segments,
        ).last_hidden_state[0]
    head = model.get_output_embeddings()
    predictor_N = torch.as_tensor(batch.predictor_N, device=device)
    target_N = torch.as_tensor(batch.target_N, device=device)
    return token_log_probs_from_hidden(
        hidden_TD[predictor_N], head.weight, getattr(head, "bias", None), target_N, dtype
    )


def _padded(model: Any, batch: PackedBatch) -> Tensor:
    """Each response in a padded sequence of its own, through the model's whole forward pass."""
    device = model.device
    rows, targets = _sequences(batch)
    longest = max(len(ids) for ids in rows)
    input_ids_SL = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    mask_SL = torch.zeros_like(input_ids_SL)
    for number, ids in enumerate(rows):
        input_ids_SL[number, : len(ids)] = torch.as_tensor(ids)
        mask_SL[number, : len(ids)] = 1
    logits_SLV = model(input_ids=input_ids_SL, attention_mask=mask_SL, use_cache=False).logits
    wide = logits_SLV.dtype if logits_SLV.dtype == torch.float64 else torch.float32
    parts = []
    for number, (first, last) in enumerate(targets):
        logits_LV = logits_SLV[number, first - 1 : last - 1].to(wide)
        target_L = input_ids_SL[number, first:last]
        parts.append(logits_LV.log_softmax(1).gather(1, target_L[:, None]).squeeze(1))
    return torch.cat(parts)


def _sequences(batch: PackedBatch) -> tuple[list[Any], list[tuple[int, int]]]:
    """Token ids of prompt + response, and the response's span in it, in the order of ``slot_N``."""
    rows, spans = [], []
    for segment in batch.segments:
        prompt = batch.input_ids_T[segment.start : segment.prompt_end].tolist()
        for first, last in segment.response_spans:
            response = batch.input_ids_T[first:last].tolist()
            rows.append(prompt + response)
            spans.append((len(prompt), len(prompt) + len(response)))
    return rows, spans


def _warn_once(model_type: str) -> None:
    if model_type not in _warned:
        _warned.add(model_type)
        warnings.warn(
            f"{model_type} models run without shared prompts: correct, but slower",
            RuntimeWarning,
            stacklevel=3,
        )


@torch.no_grad()
def score(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    dtype: torch.dtype,
    token_budget: int,
    bar: Bar | None = None,
    forward: Any = None,
) -> list[tuple[NDArray, ...]]:
    """Per-token log-probabilities of every response of every example, in the given order.

    Args:
        model: A causal language model of transformers.
        examples: What to score.
        dtype: Type of matrix products.
        token_budget: Tokens that go through the model at once.
        bar: Advanced by every example.
        forward: The model's forward pass where it is not ``token_log_probs`` itself: one that
            gathers weights from other processes, which then all have to score the same examples.
    """
    scored: list[tuple[NDArray, ...]] = [()] * len(examples)
    with autocast(dtype, model.device.type):
        for batch in pack(examples, token_budget):
            found_N = (
                forward(batch, dtype) if forward else token_log_probs(model, batch, dtype=dtype)
            )
            log_probs_N = found_N.cpu().numpy()
            for local, index in enumerate(batch.examples):
                scored[index] = tuple(
                    log_probs_N[batch.slot_N == local * batch.n_responses + number]
                    for number in range(batch.n_responses)
                )
            if bar is not None:
                bar.advance(len(batch.examples))
    return scored
