"""Log-probabilities of tokens where each process holds the output weights of a part of the tokens.

The logits of a part never leave their process: what goes round are, for each token, the largest
logit, the sum of exponentials and the target's logit. In backward, the gradient of the hidden
states.

Axes: N response tokens, n those of a chunk, D hidden size, v vocabulary of this process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_CHUNK_TOKENS = 128
GPU_ELEMENTS = 1 << 26
"""Logits in memory at once on a GPU: small chunks would keep it waiting for launches and NCCL."""


class _VocabParallel(torch.autograd.Function):
    """log softmax(hidden W^T)[target] with rows of W on several processes, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_vD: Tensor, target_N: Tensor, first: int, group: Any
    ) -> Tensor:
        size = weight_vD.shape[0]
        out_N = torch.empty(len(target_N), dtype=torch.float32, device=hidden_ND.device)
        norm_N = torch.empty_like(out_N)
        for chunk in _chunks(len(target_N), weight_vD):
            logits_nv = (hidden_ND[chunk] @ weight_vD.t()).float()
            own_n, here_n = _own(target_N[chunk], first, size)
            chosen_n = logits_nv.gather(1, own_n[:, None]).squeeze(1) * here_n
            largest_n = logits_nv.amax(1)
            dist.all_reduce(largest_n, dist.ReduceOp.MAX, group=group)
            sums_2n = torch.stack(((logits_nv - largest_n[:, None]).exp().sum(1), chosen_n))
            dist.all_reduce(sums_2n, group=group)
            norm_N[chunk] = sums_2n[0].log() + largest_n
            out_N[chunk] = sums_2n[1] - norm_N[chunk]
        ctx.save_for_backward(hidden_ND, weight_vD, target_N, norm_N)
        ctx.first, ctx.group = first, group
        return out_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_vD, target_N, norm_N = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND, dtype=torch.float32)
        grad_weight_vD = torch.zeros_like(weight_vD, dtype=torch.float32)
        for chunk in _chunks(len(target_N), weight_vD):
            logits_nv = (hidden_ND[chunk] @ weight_vD.t()).float()
            own_n, here_n = _own(target_N[chunk], ctx.first, weight_vD.shape[0])
            # d logp / d logit = onehot - softmax
            grad_nv = (logits_nv - norm_N[chunk, None]).exp_().neg_()
            grad_nv[torch.arange(len(own_n), device=own_n.device), own_n] += here_n
            grad_nv = grad_nv.mul_(grad_N[chunk, None]).to(weight_vD.dtype)
            grad_hidden_ND[chunk] = (grad_nv @ weight_vD).float()
            grad_weight_vD += grad_nv.t() @ hidden_ND[chunk]
        dist.all_reduce(grad_hidden_ND, group=ctx.group)
        hidden = grad_hidden_ND.to(hidden_ND.dtype)
        return hidden, grad_weight_vD.to(weight_vD.dtype), None, None, None


def _own(target_n: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Row of each target in this process's weights (0 where it is not here), and 1 where it is."""
    here_n = (target_n >= first) & (target_n < first + size)
    return torch.where(here_n, target_n - first, 0), here_n.float()


def _chunks(n: int, weight_vD: Tensor) -> list[slice]:
    on_gpu = weight_vD.device.type == "cuda"
    size = max(_CHUNK_TOKENS, GPU_ELEMENTS // len(weight_vD)) if on_gpu else _CHUNK_TOKENS
    return [slice(start, start + size) for start in range(0, n, size)]


def vocab_parallel_log_probs(
    hidden_ND: Tensor, weight_VD: DTensor, target_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """Log-probability of each target; float32, shape [N], with gradients; equal on every process.

    Args:
        hidden_ND: Hidden states that predict the targets, whole on every process.
        weight_VD: Output embeddings, split evenly along the vocabulary over a mesh of one axis.
        target_N: Token ids.
        dtype: Type of the products; sums and softmax are float32.
    """
    weight_vD = weight_VD.to_local()
    mesh = weight_VD.device_mesh
    first = mesh.get_local_rank() * weight_vD.shape[0]
    with torch.autocast(hidden_ND.device.type, enabled=False):
        result: Tensor = _VocabParallel.apply(
            hidden_ND.to(dtype), weight_vD.to(dtype), target_N, first, mesh.get_group()
        )
    return result
