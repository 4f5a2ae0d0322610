"""Parameters of the account, against the models that transformers builds without weights."""

import json
from dataclasses import replace

import pytest
import torch

from dpo.config.compose import compose
from dpo.config.models import LoraConfig
from dpo.errors import ConfigError, ModelError
from dpo.modeling.lora import add_adapter, trained_parameters
from dpo.plan.adapters import lora_parameters
from dpo.plan.compute import flops
from dpo.plan.job import Machine
from dpo.plan.kinds import KINDS
from dpo.plan.lengths import Lengths
from dpo.plan.preflight import check_fit
from dpo.plan.sizes import from_config


def sizes(width, n_layers, n_heads, vocab_size, **more):
    return {
        **{"hidden_size": width, "num_hidden_layers": n_layers, "num_attention_heads": n_heads},
        **{"vocab_size": vocab_size, **more},
    }


def old_sizes(width, n_layers, n_heads, vocab_size, **more):
    return {
        "n_embd": width,
        "n_layer": n_layers,
        "n_head": n_heads,
        "vocab_size": vocab_size,
    } | more


def grouped(n_kv_heads, mlp_width, **more):
    return {"num_key_value_heads": n_kv_heads, "intermediate_size": mlp_width, **more}


MODELS = [
    ("apertus", sizes(4096, 6, 32, 131072, **grouped(8, 21504))),
    ("arcee", sizes(2560, 6, 20, 128256, **grouped(4, 18432, head_dim=128))),
    ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
    ("codegen", old_sizes(1024, 6, 16, 51200)),
    ("cohere", sizes(8192, 6, 64, 256000, **grouped(64, 22528))),
    ("cohere2", sizes(4096, 6, 32, 256000, **grouped(8, 14336))),
    ("cwm", sizes(6144, 6, 48, 128256, **grouped(8, 21504))),
    ("deepseek_v2", sizes(2048, 27, 16, 102400, intermediate_size=10944, q_lora_rank=None)),
    ("deepseek_v2", sizes(5120, 4, 128, 102400, intermediate_size=12288, n_routed_experts=160)),
    ("deepseek_v3", sizes(7168, 5, 128, 129280)),
    ("ernie4_5", sizes(1024, 6, 16, 103424, **grouped(2, 3072, head_dim=128))),
    ("exaone4", sizes(2048, 6, 32, 102400, **grouped(8, 4096, head_dim=64))),
    ("falcon", sizes(4544, 32, 71, 65024, multi_query=True)),
    ("falcon", sizes(8192, 60, 128, 65024, num_kv_heads=8, new_decoder_architecture=True)),
    ("falcon", sizes(2048, 24, 32, 50304, alibi=True, multi_query=False, bias=True)),
    ("falcon", sizes(2048, 4, 32, 50304, parallel_attn=False, bias=True)),
    ("gemma", sizes(2048, 6, 8, 256000, **grouped(1, 16384, head_dim=256))),
    ("gemma2", sizes(2304, 6, 8, 256000, **grouped(4, 9216, head_dim=256))),
    ("gemma3_text", sizes(1152, 6, 4, 262144, **grouped(1, 6912, head_dim=256))),
    ("glm", sizes(4096, 6, 32, 151552, **grouped(2, 13696, attention_bias=True))),
    ("glm4", sizes(4096, 6, 32, 151552, **grouped(2, 13696))),
    ("glm4_moe", sizes(4096, 6, 96, 151552, **grouped(8, 10944, head_dim=128))),
    ("gpt2", old_sizes(1600, 6, 25, 50257)),
    ("gpt2", old_sizes(768, 6, 12, 50257, tie_word_embeddings=False, n_inner=1024)),
    ("gpt_bigcode", old_sizes(2048, 24, 16, 49152, n_positions=8192)),
    ("gpt_bigcode", old_sizes(2048, 4, 16, 49152, multi_query=False)),
    ("gpt_neo", {"hidden_size": 2048, "num_layers": 6, "attention_types": [[["global"], 6]]}),
    ("gpt_neox", sizes(2048, 6, 16, 50304, intermediate_size=8192)),
    ("gpt_neox", sizes(2048, 4, 16, 50304, attention_bias=False, tie_word_embeddings=True)),
    ("gpt_oss", sizes(2880, 6, 64, 201088, **grouped(8, 2880, num_local_experts=32))),
    ("gptj", old_sizes(4096, 6, 16, 50400)),
    ("granite", sizes(2048, 6, 32, 49155, **grouped(8, 8192, tie_word_embeddings=True))),
    ("granitemoe", sizes(1536, 6, 24, 49155, **grouped(8, 512, num_local_experts=40))),
    ("granitemoeshared", sizes(1536, 6, 24, 49155, **grouped(8, 512, shared_intermediate_size=64))),
    ("helium", sizes(2560, 6, 20, 48000, **grouped(20, 7040))),
    ("llama", sizes(2048, 6, 32, 128256, **grouped(8, 8192, tie_word_embeddings=True))),
    ("llama", sizes(512, 4, 8, 1000, attention_bias=True, mlp_bias=True, head_dim=96)),
    ("minimax_m2", sizes(3072, 6, 48, 200064, **grouped(8, 1536, num_local_experts=256))),
    ("ministral", sizes(4096, 6, 32, 131072, **grouped(8, 12288, head_dim=128))),
    ("ministral3", sizes(4096, 6, 32, 131072, **grouped(8, 14336, head_dim=128))),
    ("mistral", sizes(4096, 6, 32, 32000, **grouped(8, 14336))),
    ("mixtral", sizes(4096, 32, 32, 32000, **grouped(8, 14336, num_local_experts=8))),
    ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432}),
    ("nemotron", sizes(3072, 32, 24, 256000, **grouped(8, 9216, head_dim=128))),
    ("olmo", sizes(2048, 6, 16, 50304, intermediate_size=8192)),
    ("olmo2", sizes(2048, 6, 16, 100352, **grouped(4, 8192))),
    ("olmo3", sizes(4096, 6, 32, 100278, **grouped(32, 11008))),
    ("olmoe", sizes(2048, 6, 16, 50304, **grouped(16, 1024, num_experts=64))),
    ("opt", {}),
    ("opt", sizes(1024, 24, 16, 50272, ffn_dim=4096) | {"word_embed_proj_dim": 512}),
    ("opt", sizes(64, 2, 4, 100, ffn_dim=96) | {"do_layer_norm_before": False}),
    ("persimmon", sizes(4096, 6, 64, 262144, intermediate_size=16384)),
    ("phi", sizes(2560, 32, 32, 51200, intermediate_size=10240)),
    ("phi3", sizes(3072, 6, 32, 32064, intermediate_size=8192)),
    ("phimoe", sizes(4096, 6, 32, 32064, **grouped(8, 6400, num_local_experts=16))),
    ("qwen2", sizes(896, 6, 14, 151936, **grouped(2, 4864, tie_word_embeddings=True))),
    ("qwen2_moe", sizes(2048, 6, 16, 151936, **grouped(16, 5632))),
    ("qwen3", sizes(1024, 6, 16, 151936, **grouped(8, 3072, head_dim=128))),
    ("qwen3_moe", sizes(2048, 48, 32, 151936, **grouped(4, 6144, head_dim=128))),
    ("qwen3_moe", sizes(256, 6, 4, 100, decoder_sparse_step=2, mlp_only_layers=[3])),
    ("seed_oss", sizes(5120, 6, 80, 155136, **grouped(8, 27648, head_dim=128))),
    ("smollm3", sizes(2048, 6, 16, 128256, **grouped(4, 11008))),
    ("stablelm", sizes(2048, 6, 32, 100352, **grouped(32, 5632, use_qkv_bias=True))),
    ("stablelm", sizes(5120, 4, 32, 100352, **grouped(8, 13824, use_parallel_residual=True))),
    ("starcoder2", sizes(3072, 30, 24, 49152, **grouped(2, 12288))),
]


def built(kind, given, folder):
    """The model without weights, and the config.json that transformers writes for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(kind, bos_token_id=1, eos_token_id=2, pad_token_id=0, **given)
    settings.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    return model, json.loads((folder / "config.json").read_text())


def test_every_kind_is_compared():
    assert {kind for kind, _ in MODELS} == set(KINDS)


# of peft, for kinds whose experts it adapts
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
@pytest.mark.parametrize(("kind", "given"), MODELS)
def test_parameters_and_adapters_are_those_of_the_model(kind, given, tmp_path):
    model, values = built(kind, given, tmp_path)
    shape = from_config(values)
    assert shape.known
    true = sum(weight.numel() for weight in model.parameters())
    assert shape.parameters == pytest.approx(true, rel=0.01)
    add_adapter(model, LoraConfig(enabled=True, rank=4), "base")
    assert lora_parameters(shape, 4) == pytest.approx(trained_parameters(model), rel=0.01)


MIXTRAL = {
    "model_type": "mixtral",
    **sizes(4096, 32, 32, 32000, **grouped(8, 14336, num_local_experts=8, num_experts_per_tok=2)),
}


@pytest.fixture
def settings(tmp_path):
    def make(values, *words):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return compose(["model=blank_model", f"model.name_or_path={tmp_path}", *words]).config

    return make


def test_a_token_passes_the_experts_that_are_chosen_for_it():
    """Mixtral 8x7B: attention 41.9 M and two experts of 3 x 4096 x 14336 in each of 32 blocks."""
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    experts = 2 * 3 * 4096 * 14336 + 4096 * 8
    shape = from_config(MIXTRAL)
    assert shape.active_matrices == attention + experts
    assert shape.matrices == 32 * (attention + 8 * 3 * 4096 * 14336 + 4096 * 8)
    # 2 operations a weight, and little for attention
    forward = flops(replace(shape, vocabulary=0), Lengths(1, 1, 1)).forward
    assert forward == pytest.approx(2 * 32 * (attention + experts) * 3, rel=1e-3)


def test_experts_that_do_not_fit_are_refused_before_the_run(settings):
    config = settings(MIXTRAL, "trainer=FSDPTrainer", "lora.enabled=true")
    with pytest.raises(ConfigError, match="predicted to need"):
        check_fit(config, Machine(gpus=2, gpu="H100"))


def test_a_guess_is_said_and_stops_a_run_only_if_it_is_far_off(settings):
    """A kind that nobody knows, with the sizes of Llama 7B: about 103 GiB on one GPU."""
    llama = sizes(4096, 32, 32, 32000, intermediate_size=11008, tie_word_embeddings=False)
    values = {"model_type": "novel", **llama}
    config = settings(values)
    plan = check_fit(config, Machine(gpus=1, gpu_memory_gib=80))
    assert plan is not None
    assert not plan.fits
    assert "novel models are not known here" in plan.warnings[0]
    assert "50%" in plan.warnings[0]
    assert plan.parameters == 6_738_415_616
    with pytest.raises(ConfigError, match="predicted to need"):
        check_fit(config, Machine(gpus=1, gpu_memory_gib=40))


def test_an_unknown_kind_without_silu_has_no_gate():
    values = {"model_type": "novel", "hidden_act": "gelu", **sizes(64, 2, 4, 100)}
    assert from_config(values).mlp == ((64, 256), (256, 64))


def test_what_has_no_attention_is_not_planned():
    with pytest.raises(ModelError, match="has no num_attention_heads") as error:
        from_config({"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 32})
    assert "whose blocks have attention" in str(error.value)


def test_a_size_of_nothing_is_named():
    with pytest.raises(ModelError, match="has num_attention_heads 0"):
        from_config({"model_type": "llama", **sizes(64, 2, 0, 100)})
