"""Each choice of kernels gives what the plain one gives; what is not here is refused by name."""

import copy
import importlib.util
import shutil

import numpy as np
import pytest
import torch

from dpo.config.compose import compose
from dpo.data.packing import pack
from dpo.errors import ConfigError, MissingDependency
from dpo.modeling import attention, head, kernels, scoring, segments, varlen
from dpo.modeling.attention import prefix_shared_attention
from dpo.modeling.head import token_log_probs_from_hidden
from dpo.modeling.kernels import apply_kernels, compile_blocks
from dpo.modeling.recompute import checkpoint_activations
from dpo.modeling.rows import padded, row_tensors
from dpo.modeling.scoring import response_sums, token_log_probs
from tests.modeling.test_packing import LENGTHS, examples, loss_and_gradients, tiny_config

# torch.compile looks at .grad of tensors that are no leaves, imports modules with torch.jit, and on
# a GPU advises TF32, which would make float32 less exact
OF_TORCH = pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",
    "ignore::DeprecationWarning",
    "ignore:TensorFloat32 tensor cores:UserWarning",
)


def build(name, dtype=torch.float64):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def row_of(lengths=LENGTHS):
    (row,) = pack(examples(lengths), 5000)
    return row


def values(model, row, **options):
    return loss_and_gradients(
        model, lambda: response_sums(row, token_log_probs(model, row, packed=True, **options))
    )


def assert_same(found, expected, rtol):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=rtol)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 10 * rtol * gradient.norm() + 1e-9, name


def dense_mask(row):
    """Who sees whom, token by token."""
    n_tokens = row.n_tokens
    seen = np.zeros((n_tokens, n_tokens), dtype=bool)
    for segment in row.segments:
        for first, last in [(segment.start, segment.prompt_end), *segment.response_spans]:
            for query in range(first, last):
                seen[query, segment.start : min(query + 1, segment.prompt_end)] = True
                seen[query, first : query + 1] = True
    return torch.as_tensor(seen)


def test_the_layout_for_variable_lengths_is_that_of_dense_masks():
    """Bottom-right: query q of Q sees keys up to K - Q + q."""
    row = row_of([(7, 5, 9), (3, 1, 2), (1, 6, 6)])
    layout = varlen.varlen_layout(row.segments)
    assert layout.query_ends == (12, 21, 25, 27, 34, 40)
    assert layout.longest == (12, 16)  # prompt and chosen; prompt and rejected
    seen = torch.zeros(row.n_tokens, row.n_tokens, dtype=torch.bool)
    for (first, last), (first_key, last_key), _ in layout.sequences():
        for query in range(first, last):
            n_seen = (last_key - first_key) - (last - first) + (query - first) + 1
            seen[query, list(layout.keys[first_key : first_key + n_seen])] = True
    assert torch.equal(seen, dense_mask(row))


def varlen_of_2_11(query, key, value, ends_q, ends_k, max_q, max_k, *, scale=None, window_size=()):
    """torch 2.11's, which takes grouped heads without being told."""
    assert window_size == (-1, 0)
    return torch.zeros_like(query)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_torch_2_11_has_flash_attention_too(name, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_2_11)
    for cached in (varlen.varlen_kernel, varlen._for_grouped_heads):
        cached.cache_clear()
    try:
        row, config = row_of(), tiny_config(name)
        sent = row_tensors(row, torch.device("cpu"))
        n_kv_heads = getattr(config, "num_key_value_heads", 4)
        heads = (torch.zeros(row.n_tokens, n, 8) for n in (4, n_kv_heads, n_kv_heads))
        layout = (sent.layout, sent.key_index_K, sent.query_ends_S, sent.key_ends_S)
        assert varlen.varlen_attention(*heads, 1.0, *layout).shape == (row.n_tokens, 4, 8)
    finally:
        for cached in (varlen.varlen_kernel, varlen._for_grouped_heads):
            cached.cache_clear()


@pytest.mark.parametrize("kind", ["auto", "plain"])
def test_the_parts_of_a_row_are_made_once_for_all_its_layers(kind, monkeypatch):
    made, parts_of = [], segments.parts_of
    monkeypatch.setattr(segments, "parts_of", lambda given: made.append(given) or parts_of(given))
    model, row = build("llama"), row_of()
    assert len(model.model.layers) > 1
    apply_kernels(model, kind, device="cpu")
    token_log_probs(model, row)
    assert made == [row.segments]


@pytest.mark.parametrize("queries", [3, 128], ids=["blocks", "whole"])
def test_own_products_are_those_of_a_dense_mask(queries, monkeypatch):
    monkeypatch.setattr(segments, "_QUERIES", queries)
    row = padded(row_of(), 16)
    n_tokens = row.n_tokens
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(n_tokens, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    parts = segments.parts_of(row.segments)
    found = segments.SegmentAttention.apply(query, key, value, None, None, 0.3, parts)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (query, key, value)),
        attn_mask=dense_mask(row),
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    own = torch.autograd.grad(found, (query, key, value), upstream)
    for left, right in zip(
        own, torch.autograd.grad(expected, (query, key, value), upstream), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_torch", [False, True])
def test_the_output_layer_in_tiles_is_log_softmax(bias, by_torch, monkeypatch):
    if by_torch and not head.has_linear_cross_entropy():
        pytest.skip("this torch has no F.linear_cross_entropy")
    monkeypatch.setattr(head, "SMALLEST_TILE", 16)
    monkeypatch.setattr(head, "TILE_ELEMENTS", {"cpu": 1})
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6, requires_grad=True), torch.randn(53, 6, requires_grad=True)
    bias_v = torch.randn(53, requires_grad=True) if bias else None
    target = torch.tensor([0, 15, 16, 52, 48, 7, 7, 31, 32, 33, 1])
    inputs = [x for x in (hidden, weight, bias_v) if x is not None]
    found = token_log_probs_from_hidden(
        hidden, weight, bias_v, target, torch.float32, by_torch=by_torch
    )
    logits = hidden @ weight.t() + (bias_v if bias else 0)
    expected = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(11)
    for left, right in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_no_logits_of_a_whole_row_are_made():
    """The largest tensor that either pass makes is a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.elements = max(Largest.elements, out.numel())
            return out

    n_tokens, n_vocabulary = 4096, 12288
    hidden = torch.randn(n_tokens, 2, requires_grad=True)
    weight = torch.randn(n_vocabulary, 2, requires_grad=True)
    with Largest():
        token_log_probs_from_hidden(
            hidden, weight, None, torch.zeros(n_tokens, dtype=torch.long), torch.float32
        ).sum().backward()
    assert Largest.elements <= 2 * head.TILE_ELEMENTS["cpu"] < n_tokens * n_vocabulary / 20


def test_torch_computes_the_output_layer_by_setting():
    if not head.has_linear_cross_entropy():
        pytest.skip("this torch has no F.linear_cross_entropy")
    model, row = build("llama", torch.float32), row_of()
    expected = values(model, row)
    apply_kernels(model, "plain", output_layer="torch")
    assert_same(values(model, row), expected, 1e-5)


def test_an_output_layer_that_torch_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "has_linear_cross_entropy", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.output_layer"):
        apply_kernels(build("llama"), "auto", output_layer="torch")


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_padding_a_row_changes_nothing(name):
    model, row = build(name), row_of()
    longer = padded(row, 64)
    assert longer.n_tokens == 128
    assert padded(longer, 64) is longer
    assert_same(values(model, longer), values(model, row), 1e-9)


@OF_TORCH
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_blocks_are_compiled_once_for_rows_of_any_content(name):
    """One graph and no second compilation for rows of other examples and lengths."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = build(name, torch.float32), CompileCounter()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, backend=counter)
    compiled_frames = []
    for lengths in (LENGTHS, [(9, 4, 4)], [(30, 20, 10), (8, 8, 8)]):
        row = row_of(lengths)
        assert_same(values(compiled, row), values(model, row), 1e-4)
        compiled_frames.append(counter.frame_count)
    assert compiled_frames[0] > 0
    assert compiled_frames[2] == compiled_frames[0]


@OF_TORCH
def test_rows_of_more_lengths_than_torch_allows_are_compiled(monkeypatch):
    """Beyond its limit (8, here 2) it runs a function as it is, and warns."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    monkeypatch.setattr(scoring, "ROW_MULTIPLE", 16)
    model, counter = build("gpt_neox", torch.float32), CompileCounter()
    counts = []
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_blocks(model, backend=counter)
        for n in range(4):
            token_log_probs(model, row_of([(4 + 16 * n, 2, 2)]))
            counts.append(counter.frame_count)
    assert len(set(counts)) == 4


@OF_TORCH
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_blocks_are_recomputed_where_that_is_asked_for(mode):
    torch._dynamo.reset()
    model, row = build("llama", torch.float32), row_of()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled, backend="aot_eager")
    checkpoint_activations(compiled, mode)
    assert_same(values(compiled, row), values(model, row), 1e-4)


@pytest.mark.long
@OF_TORCH
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_blocks_give_the_plain_values():
    torch._dynamo.reset()
    model, row = build("llama", torch.float32), row_of()
    compiled = copy.deepcopy(model)
    apply_kernels(compiled, "auto", compiled=True)
    assert_same(values(compiled, row), values(model, row), 1e-4)


def test_what_cannot_be_compiled_is_refused():
    model = build("llama")
    model.config.model_type = "gptj"
    with pytest.raises(ConfigError, match=r"model\.compile=false"):
        compile_blocks(model)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="it is installed")
def test_liger_that_is_missing_is_named():
    with pytest.raises(MissingDependency, match="liger-kernel is not installed"):
        apply_kernels(build("llama"), "liger")


def test_bfloat16_products_stay_close_to_float32():
    """Fused norms, gated layers and attention under autocast, beside transformers' own."""
    model, row = build("llama", torch.float32), row_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    fused = copy.deepcopy(model)
    apply_kernels(fused, "auto")
    exact, _ = values(model, row)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, _ = values(model, row, dtype=torch.bfloat16)
        found, _ = values(fused, row, dtype=torch.bfloat16)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 0.02


def test_the_settings_reach_the_model():
    config = compose(["model.kernels=plain", "model.compile=true", "model.output_layer=torch"])
    model = config.config.model
    assert (model.kernels, model.compile, model.output_layer) == ("plain", True, "torch")


GPU = pytest.mark.gpu
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: make test-gpu")


def assert_attends_as_a_dense_mask(device, n_kv_heads, size):
    """Element by element: sums of a model's log-probabilities show no other alignment."""
    row = row_of([(40, 30, 50), (64, 10, 20), (1, 1, 1)])
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, row.n_tokens, size, dtype=torch.bfloat16)
        for heads in (4, n_kv_heads, n_kv_heads)
    ]
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    found, _ = prefix_shared_attention(torch.nn.Module(), *inputs, None, row=row)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *exact, attn_mask=dense_mask(row), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0.02, atol=0.02)
    upstream = torch.randn_like(expected)
    own = torch.autograd.grad(found, inputs, upstream.to(found))
    for left, right in zip(own, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert (left.cpu().double() - right).norm() <= 0.02 * right.norm()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_a_call_for_each_sequence_attends_as_a_dense_mask(n_kv_heads, monkeypatch):
    monkeypatch.setattr(attention, "LONGEST", 0)
    assert_attends_as_a_dense_mask("cpu", n_kv_heads, 8)


def test_the_comparison_shows_the_other_alignment(monkeypatch):
    monkeypatch.setattr(attention, "LONGEST", 0)
    monkeypatch.setattr(
        attention, "_bottom_right", lambda n, k, _: torch.ones(n, k, dtype=torch.bool).tril()
    )
    with pytest.raises(AssertionError, match="not close"):
        assert_attends_as_a_dense_mask("cpu", 2, 8)


@GPU
@NO_GPU
@pytest.mark.parametrize("size", [8, 64, 80, 256])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_variable_length_attention_on_a_gpu(n_kv_heads, size):
    assert varlen.takes_varlen(torch.zeros(1, 1, size, dtype=torch.bfloat16, device="cuda"))
    assert_attends_as_a_dense_mask("cuda", n_kv_heads, size)


@GPU
@NO_GPU
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral"])
def test_a_model_with_variable_length_attention_on_a_gpu(name):
    row = row_of([(40, 30, 50), (64, 10, 20)])
    model = build(name, torch.float32)
    exact = values(model, row)
    found, _ = values(model.to("cuda", torch.bfloat16), row, dtype=torch.bfloat16)
    assert (found.cpu().float() - exact[0]).abs().max() <= 0.01 * exact[0].abs().max()


@GPU
@NO_GPU
def test_rows_are_sent_from_pinned_memory():
    device = torch.device("cuda")
    sent = row_tensors(row_of(), device)
    assert sent.input_ids_T.is_cuda
    assert row_tensors(row := row_of(), device) is row_tensors(row, device)


@GPU
@NO_GPU
@OF_TORCH
def test_compiled_blocks_on_a_gpu():
    model, row = build("llama", torch.float32).cuda(), row_of()
    compiled = copy.deepcopy(model)
    compile_blocks(compiled)
    assert_same(values(compiled, row), values(model, row), 1e-3)


@GPU
@NO_GPU
def test_liger_on_a_gpu():
    pytest.importorskip("liger_kernel")
    model, row = build("llama", torch.float32).cuda(), row_of()
    liger = copy.deepcopy(model)
    apply_kernels(liger, "liger")
    assert_same(values(liger, row), values(model, row), 1e-3)
