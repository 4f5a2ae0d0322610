"""``model.archive``: the reference code's policy.pt, our checkpoint folders, their LATEST."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.errors import ModelError
from dpo.modeling.archive import load_policy_file
from dpo.modeling.load import load_for_training, load_model, save_model
from tests.modeling.architectures import random_model

TINY = builtin("builtin:tiny")


@pytest.fixture
def shifted():
    """The tiny model with other weights."""
    model = load_model(TINY, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5
    return model


def weights(archive):
    model, _ = load_for_training(ModelConfig(archive=str(archive)), None)
    return model.state_dict()


def assert_same(found, model):
    for name, expected in model.state_dict().items():
        assert torch.equal(found[name], expected), name


def test_a_policy_file_of_the_reference_code(shifted, tmp_path):
    path = tmp_path / "policy.pt"
    torch.save({"step_idx": 5, "state": shifted.state_dict(), "metrics": {"loss": 1.0}}, path)
    assert_same(weights(path), shifted)


@pytest.mark.parametrize("name", ["LATEST", "LATEST/policy.pt", "."])
def test_a_checkpoint_folder_by_each_of_its_names(shifted, tmp_path, name):
    _, tokenizer = load_for_training(ModelConfig(), None)
    folder = tmp_path / "LATEST"
    folder.mkdir()
    save_model(shifted, tokenizer, folder)
    assert_same(weights(tmp_path / name), shifted)


@pytest.mark.parametrize("differ", [True, False])
def test_a_configuration_says_tied_only_where_the_tables_are_one(differ, tmp_path):
    """Some files have two tables although their configuration says that there is one."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 512}
    config = LlamaConfig(num_hidden_layers=1, tie_word_embeddings=not differ, **small)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "given")
    path = tmp_path / "given" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    model = load_model(tmp_path / "given", torch.float32)
    tokenizer = load_for_training(ModelConfig(), None)[1]
    (tmp_path / "made").mkdir()
    save_model(model, tokenizer, tmp_path / "made")
    made = json.loads((tmp_path / "made" / "config.json").read_text())
    assert made["tie_word_embeddings"] is not differ


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "planted"),))

    path = tmp_path / "policy.pt"
    torch.save({"state": Planted()}, path)
    with pytest.raises(ModelError, match=r"not a policy\.pt"):
        weights(path)
    assert not (tmp_path / "planted").exists()


def _cut(path):
    torch.save({"state": {"weight": torch.zeros(9)}}, path)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (Path.touch, "the file is empty"),
        (_cut, "the file is cut short or damaged"),
        (lambda path: torch.save({"weight": torch.zeros(9)}, path), "it holds no 'state'"),
        (lambda path: torch.save([torch.zeros(9)], path), "it holds no 'state'"),
        (lambda path: path.write_bytes(b"weights"), "or is no file of torch.save"),
        (lambda path: torch.save(torch.nn.Linear(1, 1), path), "else than tensors"),
    ],
)
def test_what_is_wrong_with_a_policy_file_is_said_in_our_words(tmp_path, write, reason):
    """An empty file ended in a traceback, and torch's words advise to set weights_only to False."""
    path = tmp_path / "policy.pt"
    write(path)
    with pytest.raises(ModelError, match=reason) as caught:
        load_policy_file(torch.nn.Linear(1, 1), path)
    assert "weights_only" not in str(caught.value)


def test_weights_of_another_architecture_are_named(tmp_path):
    path = tmp_path / "policy.pt"
    torch.save({"state": {"transformer.wte.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(ModelError, match="another model"):
        weights(path)


def test_a_folder_of_another_architecture_is_named(tmp_path):
    """The run would say that it trained builtin:tiny."""
    sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    random_model("gpt2", sizes).save_pretrained(tmp_path / "gpt2")
    given = ModelConfig(name_or_path="builtin:tiny", archive=str(tmp_path / "gpt2"))
    with pytest.raises(ModelError, match="holds a gpt2 model, and builtin:tiny is a gpt_neox"):
        load_for_training(given, None)


def test_biases_that_the_model_lacks_are_not_dropped(shifted, tmp_path):
    state = {**shifted.state_dict(), "gpt_neox.layers.0.attention.q_proj.bias": torch.ones(64)}
    path = tmp_path / "policy.pt"
    torch.save({"state": state}, path)
    with pytest.raises(ModelError, match=r"unexpected weights: .*q_proj\.bias"):
        weights(path)


def test_masks_that_older_versions_stored_are_left_out(shifted, tmp_path):
    layer = "gpt_neox.layers.0.attention"
    old = {f"{layer}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    old |= {
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.ones(8),
    }
    path = tmp_path / "policy.pt"
    torch.save({"state": {**shifted.state_dict(), **old}}, path)
    assert_same(weights(path), shifted)


def test_there_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint"):
        weights(tmp_path)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    model, tokenizer = load_for_training(ModelConfig(), None)
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<new{number}>" for number in range(rows)])
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(ModelError, match="tokenizer has"):
        load_for_training(ModelConfig(name_or_path=str(folder)), None)
