"""Log-probabilities of responses under a model: the one forward pass of training and evaluation.

Two paths give the same values: rows packed with shared prompts (``attention.ARCHITECTURES``), and
separate sequences for every other causal model (``plain``).

Axes: T tokens of a row, N response tokens, E examples, R responses.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.data.packing import PackedBatch, pack
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.together import gather
from dpo.modeling.attention import packed_attention, supports_packing
from dpo.modeling.head import token_log_probs_from_hidden
from dpo.modeling.kernels import ROW_MULTIPLE, is_by_torch, is_compiled
from dpo.modeling.lanes import balanced, lanes_for, replica_of, side_by_side
from dpo.modeling.plain import plain_log_probs, warn_once
from dpo.modeling.precision import autocast
from dpo.modeling.rows import padded, row_tensors, sent
from dpo.storage.progress import Bar

NDArray = npt.NDArray[np.float32]


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

    Raises:
        ModelError: the model is not causal.
    """
    if packed is None:
        longest = int(batch.position_ids_T.max()) + 1
        packed = supports_packing(model, longest)
        if not packed:
            warn_once(model.config.model_type)
    return _packed(model, batch, dtype) if packed else plain_log_probs(model, batch)


def response_sums(batch: PackedBatch, log_probs_N: Tensor) -> Tensor:
    """Sum over the tokens of each response; shape [E, R]."""
    slot_N = row_tensors(batch, log_probs_N.device).slot_N
    sums = log_probs_N.new_zeros(len(batch.examples) * batch.n_responses)
    return sums.index_add(0, slot_N, log_probs_N).view(-1, batch.n_responses)


def response_lengths(batch: PackedBatch, device: torch.device | None = None) -> Tensor:
    """Number of tokens of each response; shape [E, R]."""
    lengths = [[last - first for first, last in s.response_spans] for s in batch.segments]
    return sent(np.asarray(lengths, dtype=np.float32), device or torch.device("cpu"))


def _packed(model: Any, batch: PackedBatch, dtype: torch.dtype) -> Tensor:
    row = padded(batch, ROW_MULTIPLE) if is_compiled(model) else batch
    sent = row_tensors(row, model.device)
    with packed_attention(model):
        hidden_TD = model.base_model(
            input_ids=sent.input_ids_T[None],
            position_ids=sent.position_ids_T[None],
            use_cache=False,
            row=row,
        ).last_hidden_state[0]
    head = model.get_output_embeddings()
    return token_log_probs_from_hidden(
        hidden_TD[sent.predictor_N],
        head.weight,
        getattr(head, "bias", None),
        sent.target_N,
        dtype,
        by_torch=is_by_torch(model),
    )


def score(
    model: Any,
    examples: Sequence[TokenizedExample],
    *,
    dtype: torch.dtype,
    token_budget: int,
    bar: Bar | None = None,
    forward: Any = None,
    spare: TokenizedExample | None = None,
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
        spare: With ``forward``, lets each process score other examples: all take as many passes as
            the one with most rows, the others with this example again.
    """
    scored: list[tuple[NDArray, ...]] = [()] * len(examples)
    n_lanes = lanes_for(model) if forward is None else 1
    rows = pack(examples, token_budget // n_lanes)
    shares = [share for share in balanced([row.n_tokens for row in rows], n_lanes) if share]
    # a replica each: a forward pass sets the attention of its model
    models = [model, *(replica_of(model) for _ in shares[1:])]
    one_at_a_time = threading.Lock()

    def lane(work: tuple[Any, list[int]]) -> None:
        own, share = work
        with torch.no_grad(), autocast(dtype, model.device.type):
            for batch in (rows[number] for number in share):
                found_N = (
                    forward(batch, dtype) if forward else token_log_probs(own, batch, dtype=dtype)
                )
                log_probs_N = found_N.cpu().numpy()
                for local, index in enumerate(batch.examples):
                    scored[index] = tuple(
                        log_probs_N[batch.slot_N == local * batch.n_responses + number]
                        for number in range(batch.n_responses)
                    )
                if bar is not None:
                    with one_at_a_time:
                        bar.advance(len(batch.examples))

    if shares:
        side_by_side(lane, list(zip(models, shares, strict=True)))
    if spare is not None:
        (idle,) = pack([spare], token_budget)
        with torch.no_grad(), autocast(dtype, model.device.type):
            for _ in range(max(gather(len(rows))) - len(rows)):
                forward(idle, dtype)
    return scored
