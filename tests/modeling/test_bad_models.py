"""Models that cannot work: each one message with the fix, before or instead of a traceback."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.config.places import builtin
from dpo.config.schema import ModelConfig
from dpo.errors import DpoError, ModelError
from dpo.modeling.load import check_length, check_tokenizer, load_for_training, load_model

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


def test_masks_that_older_versions_stored_are_no_other_model(folder):
    state = load_file(folder / "model.safetensors")
    layer = "gpt_neox.layers.0.attention"
    old = {f"{layer}.bias": torch.ones(1, 1, 8, 8), f"{layer}.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**state, **old}, folder / "model.safetensors", metadata={"format": "pt"})
    load(folder)


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
