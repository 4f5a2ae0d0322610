"""Log-probabilities of tokens from hidden states, without logits of a whole row in memory.

The vocabulary is worked on in tiles: the first pass keeps a running maximum and sum of exponentials
of each token, the backward pass makes each tile's probabilities again, and with them that tile's
share of both gradients. So a row of output weights gets its gradient from one product over all
tokens, in place, and memory holds one tile of logits, however many tokens there are.

Axes: N response tokens, D hidden size, V vocabulary, v tokens of one tile of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo.modeling.vocab_parallel import GPU_ELEMENTS, vocab_parallel_log_probs

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": GPU_ELEMENTS}
"""Logits in memory at once: on a CPU as many as its caches hold."""
SMALLEST_TILE = 512
_TILE_MULTIPLE = 128


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T + b)[target], in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        n_tokens, device = len(target_N), hidden_ND.device
        chosen_N = torch.zeros(n_tokens, dtype=wide, device=device)
        most_N = torch.full((n_tokens,), float("-inf"), dtype=wide, device=device)
        sums_N = torch.zeros(n_tokens, dtype=wide, device=device)
        for first, last in _tiles(n_tokens, weight_VD):
            logits_Nv = _logits(hidden_ND, weight_VD, bias_V, first, last, wide)
            inside_N = (target_N >= first) & (target_N < last)
            local_N1 = (target_N - first).clamp_(0, last - first - 1)[:, None]
            chosen_N += torch.where(inside_N, logits_Nv.gather(1, local_N1)[:, 0], 0.0)
            larger_N = torch.maximum(most_N, logits_Nv.amax(1))
            sums_N *= (most_N - larger_N).exp_()
            sums_N += logits_Nv.sub_(larger_N[:, None]).exp_().sum(1)
            most_N = larger_N
        log_sum_N = most_N + sums_N.log()
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, log_sum_N)
        return chosen_N - log_sum_N

    @staticmethod
    def backward(
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, bias_V, target_N, log_sum_N = ctx.saved_tensors
        wide = log_sum_N.dtype
        # sums over the vocabulary: in float32 whatever the products' type
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=wide)
        grad_weight_VD = torch.empty_like(weight_VD)
        grad_bias_V = None if bias_V is None else torch.empty_like(bias_V, dtype=wide)
        row_N = torch.arange(len(target_N), device=hidden_ND.device)
        for first, last in _tiles(len(target_N), weight_VD):
            logits_Nv = _logits(hidden_ND, weight_VD, bias_V, first, last, wide)
            # d logp / d logit = onehot - softmax
            grad_Nv = logits_Nv.sub_(log_sum_N[:, None]).exp_().mul_(-grad_N[:, None])
            # not by the rows whose target is here: how many there are a GPU would be waited for
            inside_N = (target_N >= first) & (target_N < last)
            local_N = (target_N - first).clamp_(0, last - first - 1)
            grad_Nv[row_N, local_N] += torch.where(inside_N, grad_N, 0.0)
            if grad_bias_V is not None:
                grad_bias_V[first:last] = grad_Nv.sum(0)
            grad_Nv = grad_Nv.to(weight_VD.dtype)
            grad_weight_VD[first:last] = grad_Nv.t() @ hidden_ND
            if weight_VD.dtype == wide:
                grad_hidden_ND.addmm_(grad_Nv, weight_VD[first:last])
            else:
                grad_hidden_ND += grad_Nv @ weight_VD[first:last]
        bias = None if bias_V is None or grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_ND.to(hidden_ND.dtype), grad_weight_VD, bias, None


def _tiles(n_tokens: int, weight_VD: Tensor) -> list[tuple[int, int]]:
    """(first, one past the last) token of the vocabulary, of each tile."""
    elements = TILE_ELEMENTS.get(weight_VD.device.type, 1 << 20)
    size = max(SMALLEST_TILE, elements // max(1, n_tokens))
    if weight_VD.device.type == "cuda":
        # tensor cores take rows of whole 16 bytes; others go through slow kernels
        size -= size % _TILE_MULTIPLE
    n_vocabulary = len(weight_VD)
    return [(first, min(first + size, n_vocabulary)) for first in range(0, n_vocabulary, size)]


def _logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    first: int,
    last: int,
    wide: torch.dtype,
) -> Tensor:
    logits_Nv = (hidden_ND @ weight_VD[first:last].t()).to(wide)
    return logits_Nv if bias_V is None else logits_Nv.add_(bias_V[first:last])


def token_log_probs_from_hidden(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    dtype: torch.dtype,
    *,
    by_torch: bool = False,
) -> Tensor:
    """Log-probability of each target; shape [N], with gradients.

    Args:
        hidden_ND: Hidden states that predict the targets.
        weight_VD: Output embeddings.
        bias_V: Their bias, if the model has one.
        target_N: Token ids.
        dtype: Type of the products; sums, softmax and the result are float32 (float64 for float64
            weights).
        by_torch: Let ``F.linear_cross_entropy`` do it, where this torch has it.
    """
    if isinstance(weight_VD, DTensor):
        # tensor parallel; no architecture that is split so has a bias here
        return vocab_parallel_log_probs(hidden_ND, weight_VD, target_N, dtype)
    if weight_VD.dtype == torch.float64:
        dtype = torch.float64
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if by_torch:
            return _by_torch(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V, target_N)
        result: Tensor = _TokenLogProbs.apply(
            hidden_ND.to(dtype), weight_VD.to(dtype), bias_V, target_N
        )
    return result


def has_linear_cross_entropy() -> bool:
    """Whether this torch has the chunked product with its loss (2.13 has)."""
    return hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def _by_torch(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor
) -> Tensor:
    losses_N: Tensor = F.linear_cross_entropy(
        hidden_ND,
        weight_VD,
        target_N,
        linear_bias=None if bias_V is None else bias_V.to(weight_VD.dtype),
        reduction="none",
        options=nn.LinearCrossEntropyOptions(acc_policy="accurate"),
    )
    return -losses_N.to(torch.promote_types(losses_N.dtype, torch.float32))
