"""Weights that one process read and the others got: equal to those in the files."""

import json
import subprocess
import sys

import torch
from torch import nn

from dpo.distributed.weights import outline
from dpo.modeling.load import load_model
from tests.modeling.architectures import random_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}
KINDS = {
    "gemma": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": GPT,
    "gpt_neox": SMALL,
    "gptj": GPT | {"rotary_dim": 4},
    "llama": SMALL | {"tie_word_embeddings": False},
}
"""With tied weights and without, with ``sdpa`` attention and (gptj) without."""


SPLIT = {
    "gpt_neox": SMALL | {"tie_word_embeddings": False},
    "llama": SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mistral": SMALL | {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
"""Models of which each process gets a share of every layer."""


def save(kind, settings, folder):
    model = random_model(kind, settings)
    for weight in model.parameters():
        # norms and biases begin as ones and zeros, which an empty model might have by chance
        nn.init.normal_(weight, 0.5, 0.1)
    model.save_pretrained(folder)


def test_two_processes_have_what_one_read(tmp_path):
    for kind, settings in KINDS.items():
        save(kind, settings, tmp_path / kind)
    for kind, settings in SPLIT.items():
        save(kind, settings, tmp_path / f"split-{kind}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.distributed.handed_over", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    # not torch's half an hour; and a barrier waited for a first process that came later than that
    assert found.pop("waits") == [120, 120]
    # before
    assert all(seen["empty"] for seen in found.values())
    for kind, seen in [(kind, found.pop(f"split-{kind}")) for kind in SPLIT]:
        assert seen["equal"], kind
        assert seen["tied"] == seen["expected tied"] == (kind == "mistral"), kind
        # norms are whole in each: 7 % here
        assert 0.5 < seen["share"] < 0.57, kind
    assert set(found) == set(KINDS)
    for kind, seen in found.items():
        assert seen["equal"], kind
        assert seen["same outline"], kind
        assert seen["ties"] == seen["expected ties"] == (kind in ("gemma", "gpt2")), kind


def test_a_class_that_cannot_be_made_without_values_is_read(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    random_model("llama", KINDS["llama"]).save_pretrained(tmp_path)

    def looks(*_, **__):
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", looks)
    model = load_model(tmp_path, torch.float32, weights="none")
    assert not any(weight.is_meta for weight in model.parameters())


def test_an_outline_shows_names_shapes_types_and_what_is_trained():
    def model(name="a", size=3, dtype=torch.float32, *, trained=True):
        made = nn.Module()
        weight = nn.Parameter(torch.zeros(size, dtype=dtype), requires_grad=trained)
        made.register_parameter(name, weight)
        return made

    others = [model("b"), model(size=4), model(dtype=torch.bfloat16), model(trained=False)]
    assert outline(model()) == outline(model().to("meta"))
    assert len({outline(other) for other in [model(), *others]}) == 5
