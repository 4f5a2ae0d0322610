"""Models that cannot work: each one message with the fix, before or instead of a traceback."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    GPTNeoXForSequenceClassification,
    GPTNeoXModel,
)

from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.errors import DpoError, ModelError
from dpo.modeling.load import check_length, check_tokenizer, load_for_training, load_model
from tests.modeling.architectures import random_model

TINY = builtin("builtin:tiny")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def load(folder):
    return load_for_training(ModelConfig(name_or_path=str(folder)), None)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n")


def drop_a_layer(path):
    state = load_file(path)
    del state["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"]
    save_file(state, path, metadata={"format": "pt"})


def widen(path):
    state = load_file(path)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    state[name] = torch.zeros(65, 256)
    save_file(state, path, metadata={"format": "pt"})


def add_a_weight(path):
    """As the files of a model with more layers, or of another kind, have them."""
    state = load_file(path)
    state["gpt_neox.layers.0.attention.q_norm.weight"] = torch.ones(16)
    save_file(state, path, metadata={"format": "pt"})


def make_integers(path):
    state = load_file(path)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    state[name] = (state[name] * 100).to(torch.int8)
    save_file(state, path, metadata={"format": "pt"})


def say_quantised(path, method):
    values = json.loads(path.read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
        (lambda f: (f / "model.safetensors").unlink(), "weights are missing"),
        (lambda f: truncate(f / "model.safetensors"), "weights is damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "weights is damaged"),
        (lambda f: pointer(f / "model.safetensors"), "weights is damaged"),
        (lambda f: drop_a_layer(f / "model.safetensors"), "lack"),
        (lambda f: widen(f / "model.safetensors"), "mlp.dense_4h_to_h"),
        (lambda f: add_a_weight(f / "model.safetensors"), "attention.q_norm.weight, for which"),
        (lambda f: make_integers(f / "model.safetensors"), "dense_4h_to_h.weight is of type I8"),
        (lambda f: say_quantised(f / "config.json", "gptq"), "the weights are quantised"),
        (lambda f: say_quantised(f / "config.json", "of its own"), "the weights are quantised"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_a_folder_that_is_no_whole_model(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert message in str(error.value)
    assert error.value.fix


def test_a_model_of_encoder_and_decoder_is_named_as_such(tmp_path):
    """transformers would load Bart's decoder alone, and miss embeddings that both share."""
    sizes = {"vocab_size": 100, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, encoder_ffn_dim=8, decoder_ffn_dim=8)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="this bart model is an encoder and a decoder"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("kind", [GPTNeoXForSequenceClassification, GPTNeoXModel])
def test_a_reward_model_and_a_bare_body_are_named_as_such(kind, folder):
    kind(AutoConfig.from_pretrained(TINY)).save_pretrained(folder)
    with pytest.raises(ModelError, match=f"describes a {kind.__name__}.*lack lm_head") as error:
        load(folder)
    assert "causal language model" in error.value.fix


@pytest.mark.parametrize("said", [True, False])
def test_integers_are_no_damaged_file(said, folder):
    """As bitsandbytes writes them, with its settings in config.json or without."""
    make_integers(folder / "model.safetensors")
    if said:
        say_quantised(folder / "config.json", "bitsandbytes")
    with pytest.raises(ModelError) as error:
        load(folder)
    assert ("the weights are quantised" in str(error.value)) == said
    assert "is damaged" not in str(error.value)
    assert "in bfloat16 or float32" in error.value.fix


SIZE = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZE, "intermediate_size": 8, "max_position_embeddings": 8, "is_decoder": True}
LLAMA = {**SIZE, "intermediate_size": 8, "num_key_value_heads": 2}
GPTJ = {"vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "rotary_dim": 4}


def with_more(kind, settings, shapes, folder):
    """A model's folder with more in its file of weights than transformers writes."""
    random_model(kind, settings).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    more = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file({**state, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "settings", "shapes"),
    [
        (
            "gptj",
            GPTJ,
            {
                "transformer.h.0.attn.bias": (1, 1, 8, 8),
                "transformer.h.0.attn.masked_bias": (),
                "transformer.h.0.attn.causal_mask": (1, 1, 8, 8),
            },
        ),
        (
            "llama",
            LLAMA,
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": (2,),
                "model.layers.0.self_attn.rotary_emb.cos_cached": (8, 4),
                "model.layers.0.self_attn.k_proj.k_scale": (),
            },
        ),
    ],
)
def test_what_older_versions_stored_is_no_other_model(kind, settings, shapes, tmp_path, caplog):
    load_model(with_more(kind, settings, shapes, tmp_path), torch.float32)
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("llama", LLAMA, "v_head.summary.weight"),
        ("llama", {**LLAMA, "tie_word_embeddings": True}, "score.weight"),
        ("mistral", LLAMA, "model.mtp_layers.0.norm.weight"),
        ("llama", LLAMA, "medusa_head.0.0.linear.weight"),
        ("llama", LLAMA, "vision_tower.encoder.layers.0.norm.weight"),
        ("bert", BERT, "bert.pooler.dense.weight"),
        ("bert", BERT, "cls.seq_relationship.weight"),
    ],
)
def test_another_head_or_tower_is_left_out_and_named(kind, settings, name, tmp_path, caplog):
    load_model(with_more(kind, settings, {name: (2, 8)}, tmp_path), torch.float32)
    assert f"no such part: {name}" in caplog.text


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.2.mlp.up_proj.weight", (8, 8)),
        ("model.layers.0.self_attn.q_norm.weight", (4,)),
        ("model.layers.0.attn.bias", (32,)),
        ("model.layers.0.mlp.up_proj.weight_scale", (8, 1)),
        ("layers.2.mlp.up_proj.weight", (8, 8)),
        ("model.embedding_norm.weight", (8,)),
        ("lm_head.bias", (16,)),
    ],
)
def test_more_in_the_body_is_another_model(name, shape, tmp_path):
    folder = with_more("llama", LLAMA, {name: shape}, tmp_path)
    with pytest.raises(ModelError, match=f"{re.escape(name)}, for which"):
        load_model(folder, torch.float32)


def test_pickled_weights_are_not_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="is a pickle"):
        load(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        load(folder)


@pytest.mark.parametrize("name", ["/no/such/folder", "./tinny", "builtin:tinny", ""])
def test_a_name_that_leads_nowhere(name):
    with pytest.raises(DpoError) as error:
        load_for_training(ModelConfig(name_or_path=name), None)
    assert error.value.fix


def test_another_tokenizer_than_that_of_the_weights_is_refused(folder, tmp_path):
    """The ids mean other texts, though there are embeddings for all of them."""
    other = shutil.copytree(TINY, tmp_path / "other")
    values = json.loads((other / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    first, second, *_ = [token for token in vocabulary if len(token) > 3]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(values))
    chosen = ModelConfig(name_or_path=str(folder), tokenizer_name_or_path=str(other))
    with pytest.raises(ModelError, match="tokenizer is not that of the weights"):
        load_for_training(chosen, None)
    # the model's own tokenizer from another place is fine
    same = ModelConfig(name_or_path=str(folder), tokenizer_name_or_path=str(TINY))
    load_for_training(same, None)


def test_too_few_embeddings_and_too_short_a_context():
    model = load_model(TINY, torch.float32)
    with pytest.raises(ModelError, match="at most 512"):
        check_length(model, 513)
    check_length(model, 512)

    class Larger:
        def __len__(self):
            return 1025

    with pytest.raises(ModelError, match=r"1,025 tokens, the model embeddings for 1,024"):
        check_tokenizer(model, Larger())
