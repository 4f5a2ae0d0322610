"""Rows with shared prompts against separate sequences in float64: values and every gradient.

The second part breaks the layout in each way that a mask can be wrong and asks that it shows.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo.data.packing import Segment, pack
from dpo.data.tokenize import TokenizedExample
from dpo.modeling import attention, fused
from dpo.modeling.fused import fuse
from dpo.modeling.scoring import response_sums, score, token_log_probs

VOCABULARY = 97


def tiny_config(name):
    import transformers
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig

    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 128}
    match name:
        case "gpt_neox":
            return GPTNeoXConfig(**size, **heads)
        case "llama":
            return LlamaConfig(**size, **heads, num_key_value_heads=2)
        case "mistral":
            return MistralConfig(**size, **heads, num_key_value_heads=1, sliding_window=None)
        case "gpt2":
            dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
            return GPT2Config(
                vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **dropout
            )
        case "opt":
            return transformers.OPTConfig(
                **{**size, "num_attention_heads": 4, "max_position_embeddings": 128},
                **{"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
            )
        case "phi" | "phi3" | "olmo2":
            ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
            return transformers.AutoConfig.for_model(name, **size, **heads, **ids)
        case "qwen2" | "qwen3" | "gemma":
            more = {} if name == "qwen2" else {"head_dim": 8}
            return transformers.AutoConfig.for_model(
                name, **size, **heads, **more, num_key_value_heads=2
            )
        case _:
            raise NotImplementedError(name)


@pytest.fixture(scope="module", params=attention.ARCHITECTURES)
def model(request):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config(request.param), dtype=torch.float64)
    # larger than the usual start, so that attention is far from uniform and a wrong mask shows
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def normalise_in_float64(model, monkeypatch):
    """transformers normalises in float32 whatever the model's type, our own code does not."""
    for module in model.modules():
        if type(module).__name__ in fused.NORMS:

            def exact(x, module=module):
                mean = (x * x).mean(-1, keepdim=True) + module.variance_epsilon
                return module.weight * x / mean.sqrt()

            monkeypatch.setattr(module, "forward", exact)


@pytest.fixture(params=["plain", "fused", "sdpa"])
def runs_with(request, model, monkeypatch):
    """Another model with the same weights, through each set of kernels."""
    other = copy.deepcopy(model)
    if request.param == "fused":
        fuse(other)
        normalise_in_float64(model, monkeypatch)
    elif request.param == "sdpa":
        monkeypatch.setattr(attention, "LONGEST", 0)
    return other


def examples(lengths, seed=0):
    """Random tokens; ``lengths`` has (prompt, response, ...) for each example."""
    generator = np.random.default_rng(seed)
    found = []
    for number, (prompt, *responses) in enumerate(lengths):
        ids = [
            generator.integers(0, VOCABULARY, size).astype(np.int32)
            for size in (prompt, *responses)
        ]
        found.append(TokenizedExample(str(number), ids[0], tuple(ids[1:])))
    return found


LENGTHS = [(7, 5, 9), (12, 1, 3), (1, 6, 6), (20, 11, 2)]


def by_itself(model, example, response):
    """Log-probability of one response: a plain forward pass over prompt and response alone."""
    ids = torch.as_tensor(np.concatenate([example.prompt_T, example.responses[response]])).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    start = len(example.prompt_T)
    log_probs = logits[start - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, ids[start:, None]).sum()


def loss_and_gradients(model, compute):
    model.zero_grad()
    sums = compute()
    # an unlike weight for each response: a gradient that lands on the wrong one shows
    count = torch.arange(1, sums.numel() + 1, dtype=sums.dtype, device=sums.device)
    weights = count.view(sums.shape)
    (sums * weights).sum().backward()
    return sums.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_rows_give_the_values_and_gradients_of_separate_sequences(model, runs_with, packed):
    data = examples(LENGTHS)
    (row,) = pack(data, 500)
    assert row.examples == (0, 1, 2, 3)
    expected, gradients = loss_and_gradients(
        model,
        lambda: torch.stack([torch.stack([by_itself(model, e, r) for r in (0, 1)]) for e in data]),
    )
    found, own = loss_and_gradients(
        runs_with, lambda: response_sums(row, token_log_probs(runs_with, row, packed=packed))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # llama and mistral normalise in float32 whatever the model's type
        assert (own[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


def test_the_token_budget_changes_no_value(model):
    data = examples(LENGTHS)
    whole = score(model, data, dtype=torch.float32, token_budget=500)
    single = score(model, data, dtype=torch.float32, token_budget=1)
    for left, right in zip(whole, single, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def correct(model):
    (row,) = pack(examples(LENGTHS), 500)
    with torch.no_grad():
        return row, response_sums(row, token_log_probs(model, row, packed=True))


def changed(model, row):
    with torch.no_grad():
        return response_sums(row, token_log_probs(model, row, packed=True))


def differs(left, right):
    return ((left - right).abs() > 1e-3).tolist()


def with_segment(row, number, segment):
    segments = list(row.segments)
    segments[number] = segment
    return replace(row, segments=tuple(segments))


def test_a_rejected_response_that_sees_the_chosen_one_shows(model):
    row, sums = correct(model)
    seen = row.segments[0]
    # one causal sequence from prompt to the end of the rejected response
    wrong = with_segment(row, 0, Segment(seen.start, seen.prompt_end, (seen.response_ends[1],)))
    assert differs(changed(model, wrong), sums)[0] == [False, True]


def test_a_rejected_response_that_loses_its_prompt_shows(model):
    row, sums = correct(model)
    seen = row.segments[0]
    wrong = replace(
        row,
        segments=(
            Segment(seen.start, seen.prompt_end, (seen.response_ends[0],)),
            Segment(seen.response_ends[0], seen.response_ends[0], (seen.response_ends[1],)),
            *row.segments[1:],
        ),
    )
    assert differs(changed(model, wrong), sums)[0] == [False, True]


@pytest.mark.parametrize("step", [-1, 1])
def test_positions_that_are_off_by_one_show(model, step):
    row, sums = correct(model)
    seen = row.segments[0]
    positions = row.position_ids_T.copy()
    positions[seen.response_ends[0] : seen.response_ends[1]] += step
    wrong = replace(row, position_ids_T=positions)
    assert differs(changed(model, wrong), sums)[0] == [False, True]


def test_neighbours_that_see_each_other_show(model):
    row, sums = correct(model)
    first, second = row.segments[:2]
    # the second example's prompt reaches back over the first example
    wrong = with_segment(row, 1, Segment(first.start, second.prompt_end, second.response_ends))
    joined = replace(wrong, segments=wrong.segments[1:])
    assert differs(changed(model, joined), sums)[1] == [True, True]


def test_a_first_response_token_predicted_by_its_neighbour_shows(model):
    row, sums = correct(model)
    predictor = row.predictor_N.copy()
    start_of_rejected = int(np.flatnonzero(row.slot_N == 1)[0])
    predictor[start_of_rejected] = row.segments[0].response_ends[0] - 1
    assert differs(changed(model, replace(row, predictor_N=predictor)), sums)[0] == [False, True]


def test_every_example_is_in_one_row_and_no_row_exceeds_the_budget():
    data = examples([(5, 3, 2)] * 7 + [(40, 30, 30)] + [(9, 1, 1)] * 4)
    rows = pack(data, 40)
    assert sorted(index for row in rows for index in row.examples) == list(range(12))
    assert [row.n_tokens for row in rows if row.n_tokens > 40] == [100]
