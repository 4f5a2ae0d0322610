"""Log-probabilities of tokens from hidden states, without logits of a whole row in memory.

Axes: N response tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dpo.modeling.vocab_parallel import vocab_parallel_log_probs

_CHUNK_TOKENS = 128


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden W^T + b)[target], chunk by chunk, in float32; recomputed for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N)
        out_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        for chunk in _chunks(len(target_N)):
            logits_nV = _logits(hidden_ND[chunk], weight_VD, bias_V)
            chosen_n = logits_nV.gather(1, target_N[chunk, None]).squeeze(1)
            out_N[chunk] = chosen_n - logits_nV.logsumexp(1)
        return out_N

    @staticmethod
    def backward(
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden_ND, weight_VD, bias_V, target_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        # sums over all tokens: in float32 whatever the products' type
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for chunk in _chunks(len(target_N)):
            # d logp / d logit = onehot - softmax
            grad_nV = _logits(hidden_ND[chunk], weight_VD, bias_V).softmax(1).neg_()
            grad_nV.scatter_add_(1, target_N[chunk, None], torch.ones_like(grad_nV[:, :1]))
            grad_nV.mul_(grad_N[chunk, None])
            if grad_bias_V is not None:
                grad_bias_V += grad_nV.sum(0)
            grad_nV = grad_nV.to(weight_VD.dtype)
            grad_hidden_ND[chunk] = grad_nV @ weight_VD
            if weight_VD.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_nV.t(), hidden_ND[chunk])
            else:
                grad_weight_VD += grad_nV.t() @ hidden_ND[chunk]
        bias = None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), bias, None


def _chunks(n: int) -> list[slice]:
    return [slice(start, start + _CHUNK_TOKENS) for start in range(0, n, _CHUNK_TOKENS)]


def _logits(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    logits_nV = (hidden_nD @ weight_VD.t()).float()
    return logits_nV if bias_V is None else logits_nV + bias_V.float()


def token_log_probs_from_hidden(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Log-probability of each target; float32, shape [N], with gradients.

    Args:
        hidden_ND: Hidden states that predict the targets.
        weight_VD: Output embeddings.
        bias_V: Their bias, if the model has one.
        target_N: Token ids.
        dtype: Type of the products; sums and softmax are float32 (float64 for float64 input).
    """
    if isinstance(weight_VD, DTensor):
        # tensor parallel; no architecture that is split so has a bias here
        return vocab_parallel_log_probs(hidden_ND, weight_VD, target_N, dtype)
    if weight_VD.dtype == torch.float64:
        logits_NV = hidden_ND @ weight_VD.t()
        logits_NV = logits_NV if bias_V is None else logits_NV + bias_V
        return logits_NV.log_softmax(1).gather(1, target_N[:, None]).squeeze(1)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        result: Tensor = _TokenLogProbs.apply(
            hidden_ND.to(dtype), weight_VD.to(dtype), bias_V, target_N
        )
    return result
