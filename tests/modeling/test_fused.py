"""Rotations and norms as a GPU takes them, beside transformers' own."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from dpo.modeling import fused
from dpo.modeling.kernels import apply_kernels
from tests.modeling.test_kernels import assert_same, build, row_of, values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rotation_is_that_of_transformers(dtype):
    """With its gradient; both halves of the angles are random, so neither can take the other's."""
    torch.manual_seed(0)
    x_THD = torch.randn(5, 3, 8, dtype=dtype, requires_grad=True)
    cos_TD, sin_TD, grad_THD = (torch.randn(s, dtype=dtype) for s in [(5, 8), (5, 8), (5, 3, 8)])
    found = fused._Rotation.apply(x_THD, cos_TD, sin_TD)
    expected, _ = apply_rotary_pos_emb(x_THD, x_THD, cos_TD, sin_TD, unsqueeze_dim=1)
    torch.testing.assert_close(found, expected)
    own, given = (torch.autograd.grad(out, x_THD, grad_THD)[0] for out in (found, expected))
    torch.testing.assert_close(own, given)


def test_a_norm_by_torch_is_that_of_transformers():
    """As a GPU takes it; of two types the result has the wider one."""
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 5, 16, dtype=torch.float64)
    found = fused._norm_by_torch(hidden, norm.weight, 1e-3)
    # transformers' own arithmetic is in float32
    torch.testing.assert_close(found, norm(hidden), rtol=1e-6, atol=1e-6)
    narrow = fused._norm_by_torch(hidden.bfloat16(), norm.weight.float(), 1e-3)
    assert narrow.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: make test-gpu")
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_fused_parts_on_a_gpu(name):
    """Norms and rotations, in float32 beside transformers', and in bfloat16 as near as those."""
    model, row = build(name, torch.float32).cuda(), row_of([(40, 30, 50), (64, 10, 20)])
    ours = copy.deepcopy(model)
    apply_kernels(ours, "auto")
    exact = values(model, row)
    assert_same(values(ours, row), exact, 1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain, _ = values(model, row, dtype=torch.bfloat16)
        found, _ = values(ours, row, dtype=torch.bfloat16)
    assert (found - exact[0]).abs().max() <= 2 * (plain - exact[0]).abs().max() + 0.02
