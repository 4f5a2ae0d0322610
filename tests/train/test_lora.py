"""LoRA by setting: the base is its own reference, and either form of the result loads again."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dpo.config.compose import compose
from dpo.config.models import LoraConfig, ModelConfig
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.errors import ConfigError, ModelError
from dpo.modeling import kernels
from dpo.modeling.load import load_for_training, load_model
from dpo.modeling.lora import (
    add_adapter,
    linear_names,
    merge_saved,
    trained_parameters,
    whole_state,
)
from dpo.train.stage import run_train
from tests.modeling.architectures import random_model
from tests.train.conftest import SETTINGS

RUN = [*SETTINGS, "n_examples=24", "lora.enabled=true", "lora.rank=4", "optimizer=AdamW"]
TINY = builtin("builtin:tiny")


def config_of(loss, *more):
    stage = "sft" if loss == "sft" else "preference"
    return restrict(compose([*RUN, f"loss={loss}", *more]).config, stage)


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_base_is_its_own_reference(prepared, tmp_path):
    """No reference is given: the base scores the pairs, so the first loss is ln 2, the margin 0.

    Within rounding: on a processor with AVX2 alone that of a product follows its number of rows,
    which are others where the pairs are scored, and 4e-7 was seen.
    """
    paths = {**prepared.paths(sft=False), "reference": None}
    run_train(config_of("dpo"), tmp_path / "out", **paths)
    first = next(line for line in log_of(tmp_path / "out") if "loss/train" in line)
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards_train/margins"] == pytest.approx(0.0, abs=1e-5)
    before = load_file(prepared.sft / "model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    # the blocks' matrices, and neither biases, norms nor embeddings
    assert changed == {
        f"gpt_neox.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in (
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    }


def test_an_adapter_alone_is_the_merged_model(prepared, tmp_path, monkeypatch):
    paths = prepared.paths(sft=False)
    run_train(config_of("dpo"), tmp_path / "merged", **paths)
    run_train(config_of("dpo", "lora.save=adapter"), tmp_path / "adapter", **paths)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith("model") for name in names)
    expected = load_model(tmp_path / "merged", torch.float32).state_dict()
    found = load_model(tmp_path / "adapter", torch.float32).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
    # as a start for more training too, and by peft itself
    policy, _ = load_for_training(ModelConfig(), tmp_path / "adapter")
    torch.testing.assert_close(policy.state_dict(), found)
    # with the settings of the model
    monkeypatch.setattr(kernels, "has_linear_cross_entropy", lambda: True)
    compiled = []
    monkeypatch.setattr(kernels, "compile_blocks", compiled.append)
    settings = ModelConfig(output_layer="torch", compile=True)
    policy, _ = load_for_training(settings, tmp_path / "adapter")
    assert kernels.is_by_torch(policy)
    assert compiled == [policy]
    # with all weights, which peft had frozen
    whole = config_of("sft", "lora.enabled=false", "n_examples=8")
    run_train(whole, tmp_path / "whole", pairs=prepared.data, base=tmp_path / "adapter")
    trained = load_model(tmp_path / "whole", torch.float32).state_dict()
    assert not any(torch.equal(trained[name], value) for name, value in found.items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21
def test_peft_reads_the_adapter(prepared, tmp_path):
    from peft import PeftModel

    run_train(config_of("sft", "lora.save=adapter"), tmp_path / "out", pairs=prepared.data)
    base = load_model(TINY, torch.float32)
    merged = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload()
    ours = load_model(tmp_path / "out", torch.float32)
    torch.testing.assert_close(merged.state_dict(), ours.state_dict())
    assert (
        json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"]
        == "builtin:tiny"
    )


def test_a_resumed_run_is_the_whole_one(prepared, tmp_path):
    more = ["checkpoint_every=8", "checkpoint_seconds=0"]
    paths = prepared.paths(sft=False)
    run_train(config_of("dpo"), tmp_path / "whole", **paths)
    kept = tmp_path / "kept"
    run_train(config_of("dpo", *more), tmp_path / "first", checkpoints=kept, **paths)
    # the run again from the checkpoint after step 2 of 3
    run_train(config_of("dpo", *more), tmp_path / "again", checkpoints=kept, **paths)
    whole = (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == whole


@pytest.mark.long
def test_two_processes_follow_one(prepared, tmp_path, monkeypatch):
    paths = prepared.paths(sft=False)
    run_train(config_of("dpo", "lr=1e-5"), tmp_path / "one", **paths)
    monkeypatch.setenv("DPO_PROCESSES", "2")
    more = ("lr=1e-5", "trainer=FSDPTrainer")
    run_train(config_of("dpo", *more), tmp_path / "two", **paths)
    run_train(config_of("dpo", *more, "lora.save=adapter"), tmp_path / "adapter", **paths)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
    again, whole = (
        load_model(tmp_path / n, torch.float32).state_dict() for n in ("adapter", "two")
    )
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)


def test_the_change_is_scaled_by_alpha_over_rank():
    """rank 1, alpha 3: W + 3 B A. A is a row of ones, B a column of twos: every element + 6."""
    model = load_model(TINY, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_adapter(model, LoraConfig(enabled=True, rank=1, alpha=3.0, modules=["dense"]), "base")
    # two layers of 64 x 64: 64 + 64 weights each
    assert trained_parameters(model) == 2 * 128
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight.fill_(1.0)
            if "lora_B" in name:
                weight.fill_(2.0)
    after = whole_state(model, None)
    assert after.keys() == before.keys()
    for name, value in after.items():
        change = 6.0 if name.endswith("attention.dense.weight") else 0.0
        torch.testing.assert_close(value, before[name] + change)


def test_an_unknown_module_is_named(prepared, tmp_path):
    config = config_of("sft", "lora.modules=[q_proj]")
    with pytest.raises(ConfigError, match="query_key_value"):
        run_train(config, tmp_path / "out", pairs=prepared.data)


@pytest.mark.parametrize("modules", ["lora.modules=[]", "lora.modules=[embed_in]"])
def test_modules_that_no_adapter_can_change_are_refused(modules, prepared, tmp_path):
    with pytest.raises(ConfigError, match="linear layer"):
        run_train(config_of("sft", modules), tmp_path / "out", pairs=prepared.data)


def test_linear_layers_of_a_class_of_its_own_are_found():
    """Falcon's are of a subclass of torch's."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
    model = random_model("falcon", sizes)
    assert linear_names(model) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    add_adapter(model, LoraConfig(enabled=True), "base")
    assert trained_parameters(model)


def test_layers_that_kernels_read_past_an_adapter_are_no_part_of_all():
    """`lora.modules=all` ended with peft's refusal of out_proj."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = random_model("mamba", sizes)
    assert "out_proj" in linear_names(model)
    add_adapter(model, LoraConfig(enabled=True, rank=2), "base")
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"in_proj", "x_proj", "dt_proj"}
    settings = LoraConfig(enabled=True, rank=2, modules=["out_proj"])
    fresh = random_model("mamba", sizes)
    with pytest.raises(ConfigError, match="out_proj"):
        add_adapter(fresh, settings, "base")


def test_an_adapter_alone_is_not_trained_on_a_file_of_weights(prepared, tmp_path):
    path = tmp_path / "policy.pt"
    torch.save({"state": load_model(TINY, torch.float32).state_dict()}, path)
    config = config_of("sft", "lora.save=adapter", f"model.archive={path}")
    with pytest.raises(ConfigError, match="a base that can be opened"):
        run_train(config, tmp_path / "out", pairs=prepared.data)


def test_an_adapter_opens_from_any_folder_and_on_its_own_base_alone(
    prepared, tmp_path, monkeypatch
):
    shutil.copytree(prepared.sft, tmp_path / "sft")
    monkeypatch.chdir(tmp_path)
    config = config_of("sft", "lora.save=adapter")
    run_train(config, tmp_path / "out", pairs=prepared.data, base=Path("sft"))
    monkeypatch.chdir(prepared.data)
    load_model(tmp_path / "out", torch.float32)
    manifest = tmp_path / "sft/manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "content_hash": "0" * 64}))
    with pytest.raises(ModelError, match="trained on other weights"):
        load_model(tmp_path / "out", torch.float32)


@pytest.mark.parametrize("named", ["", "LATEST/policy.pt"])
def test_an_adapter_on_a_run_that_an_archive_names_opens(named, prepared, tmp_path):
    """``model.archive`` may be a run's folder, or the policy.pt that was once in it: neither is a
    folder that a base can be opened from, and the adapter named it."""
    shutil.copytree(prepared.sft, tmp_path / "run/LATEST")
    archive = f"model.archive={tmp_path}/run/{named}"
    config = config_of("sft", "n_epochs=0", "lora.save=adapter", archive)
    run_train(config, tmp_path / "out", pairs=prepared.data)
    load_model(tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda state, name: state.pop(name), "is not in its file"),
        (lambda state, name: state.update({name.replace("s.0", "s.9"): state[name]}), "place"),
    ],
)
def test_an_adapter_of_other_layers_is_refused(damage, words, prepared, tmp_path):
    """peft would leave those layers as they were."""
    run_train(config_of("sft", "lora.save=adapter"), tmp_path / "out", pairs=prepared.data)
    path = tmp_path / "out/adapter_model.safetensors"
    state = load_file(path)
    damage(state, next(name for name in state if "lora_B" in name))
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        load_model(tmp_path / "out", torch.float32)


def foreign_adapter(folder, weights, **config):
    """An adapter's folder as another tool writes it."""
    folder.mkdir()
    values = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    prefix = "base_model.model.model.layers.0."
    named = {prefix + name: value for name, value in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_experts_that_were_adapted_one_by_one_are_merged(tmp_path):
    """As transformers 4 names them; now the experts of a block are one tensor."""
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = random_model("mixtral", sizes)
    rows = {"w1": (12, 8), "w2": (8, 12), "w3": (12, 8)}
    draw = np.random.default_rng(0)
    pairs = {
        (expert, name): [draw.normal(size=s).astype("f4") for s in ((n_out, 2), (2, n_in))]
        for expert in (0, 1)
        for name, (n_out, n_in) in rows.items()
    }
    weights = {}
    for (expert, name), (b, a) in pairs.items():
        layer = f"block_sparse_moe.experts.{expert}.{name}"
        weights |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(rows)}
    folder = foreign_adapter(tmp_path / "adapter", weights, **settings)
    experts = model.model.layers[0].mlp.experts
    up, down = (w.detach().clone() for w in (experts.gate_up_proj, experts.down_proj))
    experts = merge_saved(model, folder).model.layers[0].mlp.experts
    for expert in (0, 1):
        # alpha / rank is 2
        w1, w2, w3 = (2 * np.matmul(*pairs[expert, name]) for name in sorted(rows))
        expected = up[expert] + torch.from_numpy(np.concatenate([w1, w3]))
        torch.testing.assert_close(experts.gate_up_proj[expert], expected, rtol=0, atol=1e-5)
        expected = down[expert] + torch.from_numpy(w2)
        torch.testing.assert_close(experts.down_proj[expert], expected, rtol=0, atol=1e-5)


def test_an_adapter_of_another_kind_with_other_layers_is_refused(tmp_path):
    """IA3 scales what the layers give; its weights have names of their own."""
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    scales = {"self_attn.k_proj.ia3_l": np.full((8, 1), 2, "f4")}
    folder = foreign_adapter(tmp_path / "sound", scales, **settings)
    model = random_model("llama", sizes)
    before = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    merged = merge_saved(model, folder).model.layers[0].self_attn.k_proj.weight
    torch.testing.assert_close(merged, 2 * before)
    other = {"attention.k_proj.ia3_l": np.full((8, 1), 2, "f4")}
    folder = foreign_adapter(tmp_path / "other", other, **settings)
    with pytest.raises(ModelError, match=r"attention\.k_proj.* has no place in it"):
        merge_saved(random_model("llama", sizes), folder)


def test_a_base_that_is_gone_is_named(prepared, tmp_path):
    run_train(config_of("sft", "lora.save=adapter"), tmp_path / "out", pairs=prepared.data)
    path = tmp_path / "out/adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ModelError, match=r"base model .*gone cannot be had"):
        load_model(tmp_path / "out", torch.float32)


def test_tensor_parallel_refuses_it(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PROCESSES", "1")
    config = config_of("sft", "trainer=TensorParallelTrainer")
    with pytest.raises(ConfigError, match="LoRA and tensor parallelism"):
        run_train(config, tmp_path / "out", pairs=prepared.data)
