"""Models without a packed path: their values equal a plain forward pass of each sequence alone."""

import json

import pytest
import torch

from dpo.data.packing import pack
from dpo.errors import ModelError
from dpo.modeling import plain
from dpo.modeling.load import check_length, load_model
from dpo.modeling.scoring import response_sums, token_log_probs
from tests.modeling.architectures import HYBRID, random_model
from tests.modeling.test_packing import (
    LENGTHS,
    VOCABULARY,
    by_itself,
    examples,
    loss_and_gradients,
)

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48, "num_key_value_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, **IDS}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
CONFIGS = {
    "gptj": {**GPT, **NO_DROPOUT, "rotary_dim": 4, "n_positions": 128},  # attention of its own
    "codegen": {**GPT, **NO_DROPOUT, "rotary_dim": 4},
    "bloom": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        **IDS,
    },  # alibi
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "max_seq_len": 128,
    },
    "falcon": {**SIZE, "num_attention_heads": 4, **IDS},
    "stablelm": {**SIZE, **HEADS},
    # sliding windows shorter than the sequences, and than the padding
    "mistral": {**SIZE, **HEADS, "sliding_window": 8},
    "gemma2": {**SIZE, **HEADS, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {**SIZE, **HEADS, "head_dim": 8, "sliding_window": 8},
    # mixtures of experts; attention with sinks and without one of torch's; states in its place
    "mixtral": {**SIZE, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **SIZE,
        **HEADS,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "mamba": {**SIZE, "state_size": 4},
    "granitemoehybrid": {**SIZE, **HEADS, **HYBRID},
}


def build(name, **settings):
    # grouped products of experts know no float64
    model = random_model(name, settings, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_separate_sequences(name, monkeypatch, caplog):
    monkeypatch.setattr(plain, "_warned", set())
    model, data = build(name, **CONFIGS[name]), examples(LENGTHS)
    (row,) = pack(data, 500)
    expected, gradients = loss_and_gradients(
        model,
        lambda: torch.stack([torch.stack([by_itself(model, e, r) for r in (0, 1)]) for e in data]),
    )

    def compute():
        return response_sums(row, token_log_probs(model, row))

    found, own = loss_and_gradients(model, compute)
    compute()
    said = [record.getMessage() for record in caplog.records if record.name == plain.__name__]
    kind = model.config.model_type
    assert said == [f"{kind} models run without shared prompts: correct, but slower"]
    # some of them mask or normalise in float32
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-6)
    for key, gradient in gradients.items():
        assert (own[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, key


@pytest.mark.parametrize("name", ["gemma2", "granite_swa"])
def test_a_first_row_without_padding_says_nothing_of_the_next(name):
    """Responses of one length first, then padding longer than the window: it sees only padding."""
    sizes = {**SIZE, **HEADS, "sliding_window": 4}
    model = build(name, **sizes, **({"head_dim": 8} if name == "gemma2" else {}))
    (even,) = pack(examples([(6, 4, 4)]), 500)
    assert torch.isfinite(token_log_probs(model, even)).all()
    data = examples([(5, 3, 30), (2, 2, 12)])
    (row,) = pack(data, 500)
    found, own = loss_and_gradients(
        model, lambda: response_sums(row, token_log_probs(model, row))[row.examples.index(0)]
    )
    expected, gradients = loss_and_gradients(
        model, lambda: torch.stack([by_itself(model, data[0], r) for r in (0, 1)])
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-5)
    for key, gradient in gradients.items():
        assert (own[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_it_is_loaded_as_it_was_saved(name, tmp_path):
    model = build(name, **CONFIGS[name]).float()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.float32)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0],
    "long_factor": [4.0, 9.0],
    "factor": 8.0,
    "original_max_position_embeddings": 12,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
}


@pytest.mark.parametrize("packed", [None, False])
def test_a_pair_is_not_rotated_as_the_longer_one_beside_it(packed):
    """LongRoPE has other factors beyond 12 tokens; of a batch transformers takes the longest's."""
    sizes = {**SIZE, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 48}
    sizes |= {"max_position_embeddings": 96, "pad_token_id": 0, "rope_parameters": LONGROPE}
    # Phi-3's own setting of the length goes before the one in rope_parameters
    sizes |= {"original_max_position_embeddings": LONGROPE["original_max_position_embeddings"]}
    model, data = build("phi3", **sizes), examples([(4, 3, 5), (20, 6, 4), (9, 2, 6)])
    (row,) = pack(data, 500)
    expected = torch.stack([torch.stack([by_itself(model, e, r) for r in (0, 1)]) for e in data])
    found = response_sums(row, token_log_probs(model, row, packed=packed))
    order = [row.examples.index(n) for n in range(len(data))]
    torch.testing.assert_close(found[order], expected, rtol=1e-6, atol=1e-6)


def test_a_model_around_a_language_model_is_scored():
    """Gemma 3 with eyes: the sizes of its vocabulary and context are its text model's."""
    text = {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    text |= {"head_dim": 8, "max_position_embeddings": 64}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = build("gemma3", text_config=text, vision_config=eyes)
    (row,) = pack(examples(LENGTHS), 500)
    assert torch.isfinite(token_log_probs(model, row)).all()
    with pytest.raises(ModelError, match="context 64 tokens"):
        check_length(model, 65)


OWN_CODE = """
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

class LlamaMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
        return super().forward(x + before)

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = LlamaMLP(config)
"""


def test_code_of_a_model_under_a_known_name_is_taken_as_it_is(tmp_path):
    """A layer that looks at the tokens before in its own way: rows with neighbours mix it up."""
    build("llama", **SIZE, **HEADS).float().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("import torch\n" + OWN_CODE)
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    model, data = load_model(tmp_path, torch.float32, trust_remote_code=True), examples(LENGTHS)
    assert type(model).__name__ == "OwnForCausalLM"
    (row,) = pack(data, 500)
    with torch.no_grad():
        expected = torch.stack(
            [torch.stack([by_itself(model, e, r) for r in (0, 1)]) for e in data]
        )
        found = response_sums(row, token_log_probs(model, row))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
        known = response_sums(row, token_log_probs(model, row, packed=True))
    assert (known - expected).abs().max() > 0.1


def test_code_that_comes_with_a_model_is_allowed_by_a_setting_that_is_named(tmp_path):
    build("llama", **SIZE, **HEADS).float().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text("from transformers import LlamaConfig as OwnConfig\n")
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"set model\.trust_remote_code=true"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_hardly_sees_what_comes_is_refused(dtype):
    """BERT as it is made: tokens change those before them by 1e-4 of the largest logit."""
    settings = {**SIZE, "num_attention_heads": 4, "intermediate_size": 48}
    model = random_model("bert", settings)
    (row,) = pack(examples([(30, 6, 9)]), 500)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
        with pytest.raises(ModelError, match="not causal"):
            token_log_probs(model, row, packed=False)
        decoder = random_model("bert", {**settings, "is_decoder": True})
        assert torch.isfinite(token_log_probs(decoder, row, packed=False)).all()


def test_a_model_that_is_not_causal_is_refused():
    model = build("bert", **SIZE, num_attention_heads=4, intermediate_size=48)
    (row,) = pack(examples(LENGTHS), 500)
    with pytest.raises(ModelError, match="not causal"):
        token_log_probs(model, row, packed=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_16_bits_hide_no_token_that_sees_what_comes(dtype):
    """A BERT whose leak is a hundredth of the largest logit, about what bfloat16 rounds off."""
    settings = {**SIZE, "hidden_size": 128, "num_hidden_layers": 4}
    settings |= {"num_attention_heads": 4, "intermediate_size": 256}
    (row,) = pack(examples([(30, 6, 9)]), 500)
    with torch.no_grad():
        with pytest.raises(ModelError, match="not causal"):
            token_log_probs(random_model("bert", settings).to(dtype), row, packed=False)
        decoder = random_model("bert", {**settings, "is_decoder": True}).to(dtype)
        assert torch.isfinite(token_log_probs(decoder, row, packed=False)).all()


def test_experts_that_round_otherwise_are_causal():
    """Which tokens an expert is handed together depends on those after: 1e-5 of the logits here."""
    sizes = {**SIZE, "hidden_size": 256, "num_hidden_layers": 24, "initializer_range": 0.2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    sizes |= {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
    model = random_model("qwen3_moe", sizes)
    for seed in range(3):
        row = torch.randint(0, VOCABULARY, (200,), generator=torch.manual_seed(seed)).tolist()
        with torch.no_grad():
            assert plain._is_causal(model, row)
