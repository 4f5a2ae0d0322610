"""Elementwise parts of Llama's family in few passes over memory, with backward passes of their own.

These parts are bound by memory: transformers' RMS norm makes seven passes over a row's hidden
states and keeps four copies for the backward pass. Here one copy is kept, and under autocast the
result has the type in which the next product wants it. On a CPU rows are worked on in blocks that
stay in the cache; on a GPU torch's own kernel takes the norm, and queries and keys are rotated in
the layout that variable-length attention wants. Arithmetic is in float32 at least.

Axes: T rows, D size (of a head, in a rotation), F size of the feed-forward layer, H heads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo.data.packing import PackedBatch
from dpo.modeling.attention import attend, is_known, takes_own_products
from dpo.modeling.segments import SegmentAttention, parts_of_row

_BLOCK_ELEMENTS = 1 << 16
"""Elements worked on at once: 256 KB in float32, a fraction of a core's second-level cache."""

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_ATTENTIONS = ("LlamaAttention", "MistralAttention")


def fuse(model: Any) -> None:
    """Let the norms and feed-forward layers of ``model`` run through this module; idempotent."""
    for module in filter(is_known, model.modules()):
        kind = type(module).__name__
        if kind in NORMS:
            module.forward = partial(_norm, module)
        elif kind in _MLPS and getattr(module.config, "hidden_act", "") == "silu":
            module.forward = partial(_feed_forward, module)
        elif kind in _ATTENTIONS:
            module.forward = partial(_attention, module)


def in_blocks(device: torch.device) -> bool:
    """Whether rows are worked on in blocks that a cache holds."""
    return device.type == "cpu"


def _norm(module: Any, hidden: Tensor) -> Tensor:
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if not in_blocks(hidden.device):
        with torch.autocast(device, enabled=False):
            return _norm_by_torch(hidden, module.weight, module.variance_epsilon).to(dtype)
    result: Tensor = _RMSNorm.apply(hidden, module.weight, module.variance_epsilon, dtype)
    return result


def _norm_by_torch(hidden: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """In one kernel each way; of two types the wider one."""
    dtype = torch.promote_types(hidden.dtype, weight_D.dtype)
    return F.rms_norm(hidden.to(dtype), weight_D.shape, weight_D.to(dtype), eps)


def _feed_forward(module: Any, hidden: Tensor) -> Tensor:
    if not in_blocks(hidden.device):
        # one kernel more than autograd's, for a cache that is not there
        own: Tensor = type(module).forward(module, hidden)
        return own
    gated = _GatedSilu.apply(module.gate_proj(hidden), module.up_proj(hidden))
    result: Tensor = module.down_proj(gated)
    return result


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    *args: Any,
    row: PackedBatch | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Packed rows with the rotation inside; anything else as transformers has it."""
    own_products = row is not None and takes_own_products(hidden_states.device, row.segments)
    if row is None or (in_blocks(hidden_states.device) and not own_products):
        return _as_it_was(module, hidden_states, position_embeddings, *args, row=row, **others)
    query_THD, key_THD, value_THD = (
        projection(hidden_states)[0].view(hidden_states.shape[1], -1, module.head_dim)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    cos_TD, sin_TD = (angles_BTD[0] for angles_BTD in position_embeddings)
    with torch.autocast(hidden_states.device.type, enabled=False):
        if own_products:
            out_THD = SegmentAttention.apply(
                *(query_THD, key_THD, value_THD, cos_TD, sin_TD),
                *(module.scaling, parts_of_row(row)),
            )
        else:
            query_THD, key_THD = (
                _Rotation.apply(x_THD, cos_TD, sin_TD) for x_THD in (query_THD, key_THD)
            )
            out_THD = attend(query_THD, key_THD, value_THD, module.scaling, row)
    return module.o_proj(out_THD.flatten(1)[None]), None


def _as_it_was(
    module: Any, *args: Any, row: PackedBatch | None, **others: Any
) -> tuple[Tensor, None]:
    more = others if row is None else {**others, "row": row}
    result: tuple[Tensor, None] = type(module).forward(module, *args, **more)
    return result


def _block_rows(values_TD: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // values_TD.shape[1])


def _blocks(values_TD: Tensor) -> list[slice]:
    rows = _block_rows(values_TD)
    return [slice(start, start + rows) for start in range(0, len(values_TD), rows)]


def _scratch(values_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for one block: allocated once, for glibc looks long for so much."""
    rows = min(len(values_TD), _block_rows(values_TD))
    return torch.empty(rows, values_TD.shape[1], dtype=dtype, device=values_TD.device)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w over the last axis, given in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        out_TD = torch.empty_like(hidden_TD, dtype=dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale_T1 = torch.empty(len(hidden_TD), 1, dtype=wide, device=hidden.device)
        weight_wide_D = _wide(weight_D)
        scratch_tD = _scratch(hidden_TD, wide)
        for block in _blocks(hidden_TD):
            part_tD = _wide(hidden_TD[block])
            norm_t1 = torch.linalg.vector_norm(part_tD, dim=1, keepdim=True)
            scale_T1[block] = norm_t1.square_().div_(part_tD.shape[1]).add_(eps).rsqrt_()
            normal_tD = torch.mul(part_tD, scale_T1[block], out=scratch_tD[: len(part_tD)])
            torch.mul(normal_tD, weight_wide_D, out=out_TD[block])
        ctx.save_for_backward(hidden_TD, weight_D, scale_T1)
        return out_TD.view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_D, scale_T1 = ctx.saved_tensors
        grad_TD = grad.reshape(hidden_TD.shape)
        out_TD = torch.empty_like(hidden_TD)
        wide = scale_T1.dtype
        grad_weight_D = torch.zeros_like(weight_D, dtype=wide)
        weight_wide_D = _wide(weight_D)
        scratch = [_scratch(hidden_TD, wide) for _ in range(3)]
        for block in _blocks(hidden_TD):
            part_tD = hidden_TD[block]
            normal_tD, grad_tD, product_tD = (buffer[: len(part_tD)] for buffer in scratch)
            torch.mul(part_tD, scale_T1[block], out=normal_tD)
            grad_tD.copy_(grad_TD[block])
            torch.mul(grad_tD, normal_tD, out=product_tD)
            grad_weight_D += product_tD.sum(0)
            grad_tD.mul_(weight_wide_D)
            mean_t1 = torch.mul(grad_tD, normal_tD, out=product_tD).mean(1, keepdim=True)
            grad_tD.addcmul_(normal_tD, mean_t1, value=-1)
            torch.mul(grad_tD, scale_T1[block], out=out_TD[block])
        return out_TD.view(grad.shape), grad_weight_D.to(weight_D.dtype), None, None


class _Rotation(torch.autograd.Function):
    """Rotary positions: x cos + rotate_half(x) sin, in the type of x (https://arxiv.org/abs/2104.09864)."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotated(x_THD, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        # the transpose: sines of the other half, and the other way round
        other_TD = sin_TD.roll(sin_TD.shape[1] // 2, dims=1)
        return _rotated(grad_THD, cos_TD, -other_TD), None, None


def _rotated(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    out_THD = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
    cos_T1D, sin_T1D = _wide(cos_TD)[:, None], _wide(sin_TD)[:, None]
    half = x_THD.shape[-1] // 2
    first, second = slice(None, half), slice(half, None)
    for own, other, sign in ((first, second, -1), (second, first, 1)):
        turned = x_THD[..., own] * cos_T1D[..., own]
        turned.addcmul_(x_THD[..., other], sin_T1D[..., own], value=sign)
        out_THD[..., own] = turned
    return out_THD


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        gate_TF, up_TF, out_TF = (x.view(-1, x.shape[-1]) for x in (gate, up, out))
        for block in _blocks(gate_TF):
            silu_tF = torch.ops.aten.silu.out(gate_TF[block], out=out_TF[block])
            silu_tF.mul_(up_TF[block])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        views = (x.view(-1, x.shape[-1]) for x in (gate, up, grad, grad_gate, grad_up))
        gate_TF, up_TF, grad_TF, grad_gate_TF, grad_up_TF = views
        for block in _blocks(gate_TF):
            gate_tF, grad_tF, grad_gate_tF = gate_TF[block], grad_TF[block], grad_gate_TF[block]
            torch.ops.aten.silu.out(gate_tF, out=grad_up_TF[block]).mul_(grad_tF)
            torch.mul(grad_tF, up_TF[block], out=grad_gate_tF)
            torch.ops.aten.silu_backward.grad_input(grad_gate_tF, gate_tF, grad_input=grad_gate_tF)
        return grad_gate, grad_up
