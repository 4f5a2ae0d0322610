"""Adapters: published alone, or merged into their base."""

import json
import shutil

import pytest
import torch
import yaml

from dpo.errors import ArtifactError, ConfigError
from dpo.publish import adapter
from dpo.publish.tensors import model_tensors, write_model
from dpo.storage.manifest import read_manifest
from tests.publish.checkpoints import READ_BY_VLLM, checkpoint, logits, published

# peft 0.18 reads an attribute that transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def lora(folder, base, **options):
    """An adapter of the tiny model with weights that are not zero; returns the merged logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(str(base))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    for path in base.iterdir():
        if path.name.startswith("tokenizer"):
            shutil.copy(path, folder)
    (folder / "README.md").unlink(missing_ok=True)
    merged = model.merge_and_unload()
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        return merged(input_ids=ids).logits.float()


NEOX = {"r": 4, "lora_alpha": 16, "target_modules": ["query_key_value", "dense_h_to_4h"]}


@pytest.mark.parametrize(
    "options",
    [
        NEOX,
        {**NEOX, "use_rslora": True},
        {**NEOX, "rank_pattern": {"dense_h_to_4h": 8}, "alpha_pattern": {"dense_h_to_4h": 4}},
        # regular expressions, of which the first counts
        {**NEOX, "alpha_pattern": {r"layers\.0\..*": 64, "query_key_value": 4}},
    ],
    ids=["plain", "rank-stabilised", "patterns", "expressions"],
)
def test_a_merged_adapter_is_what_peft_merges(tmp_path, tiny_model, options):
    expected = {}
    policy = checkpoint(
        tmp_path / "policy",
        lambda folder: expected.update(logits=lora(folder, tiny_model, **options)),
    )
    published(policy, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {*READ_BY_VLLM, "model.safetensors", "README.md"}
    assert torch.allclose(logits(tmp_path / "model"), expected["logits"], atol=1e-5)
    assert not torch.allclose(logits(tmp_path / "model"), logits(tiny_model), atol=1e-2)


def test_an_adapter_of_conv1d_weights_is_transposed(tmp_path, tiny_model):
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=1024, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(base)
    expected = {}
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    policy = checkpoint(
        tmp_path / "policy",
        lambda folder: expected.update(logits=lora(folder, base, **options)),
    )
    published(policy, tmp_path / "model")
    assert torch.allclose(logits(tmp_path / "model"), expected["logits"], atol=1e-5)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
    expected = values.to(torch.bfloat16).view(torch.uint16).numpy().tobytes()
    assert adapter.from_float(values.numpy(), "BF16") == expected


def test_an_adapter_alone_names_its_base_and_no_path(tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = {}
    policy = checkpoint(
        tmp_path / "policy", lambda folder: expected.update(x=lora(folder, tiny_model, **NEOX))
    )
    published(policy, tmp_path / "model", "publish.lora=adapter")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    config = json.loads((tmp_path / "model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "builtin:tiny"
    assert "- Base model: builtin:tiny\n" in (tmp_path / "model/README.md").read_text()

    def load(folder):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)

    assert torch.allclose(logits(tmp_path / "model", load), expected["x"], atol=1e-5)


def test_an_adapter_of_an_sft_model_does_not_pretend_to_fit_the_hubs(tmp_path, tiny_model):
    policy = checkpoint(
        tmp_path / "policy",
        lambda folder: lora(folder, tiny_model, **NEOX) is None,
        parents={"base": "a" * 64},
    )
    published(policy, tmp_path / "model", "publish.lora=adapter")
    config = json.loads((tmp_path / "model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"sft-checkpoint-{'a' * 64}"
    readme = (tmp_path / "model/README.md").read_text()
    metadata = yaml.safe_load(readme.split("---")[1])
    assert metadata["library_name"] == "peft"
    assert "base_model" not in metadata
    assert f"Base model: the SFT checkpoint with content hash `{'a' * 64}`" in readme
    assert "PeftModel.from_pretrained(model, folder)" in readme
    assert "vllm" not in readme.lower()


def test_a_checkpoint_without_an_adapter_is_not_published_as_one(tmp_path):
    with pytest.raises(ConfigError, match="the checkpoint holds no adapter"):
        published(checkpoint(tmp_path / "policy"), tmp_path / "model", "publish.lora=adapter")


def test_an_adapter_whose_base_is_gone_is_not_merged(tmp_path, tiny_model):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    policy = checkpoint(tmp_path / "policy", lambda folder: lora(folder, base, **NEOX) is None)
    shutil.rmtree(base)
    with pytest.raises(ConfigError, match="its base is not on this machine"):
        published(policy, tmp_path / "model")


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model):
    lora(tmp_path, tiny_model, **NEOX)
    weights = model_tensors(tiny_model)
    config = adapter.read_config(tmp_path)
    smaller = {name: t for name, t in weights.items() if "layers.1" not in name}
    base = tmp_path / "smaller"
    base.mkdir()
    write_model(base, list(smaller.values()), 1 << 30)
    with pytest.raises(ArtifactError, match="which its base does not have"):
        adapter.merge(tmp_path, base, tmp_path, 1 << 30)
    assert config["peft_type"] == "LORA"


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "lora_ga"])
def test_an_adapter_that_changes_its_base_when_it_is_opened_is_not_merged(
    tmp_path, tiny_model, start
):
    """peft takes from the base's weights what it began with: W + s B A has it twice."""
    lora(tmp_path, tiny_model, **NEOX)
    config = json.loads((tmp_path / adapter.CONFIG).read_text())
    (tmp_path / adapter.CONFIG).write_text(json.dumps({**config, "init_lora_weights": start}))
    with pytest.raises(ArtifactError, match=f"init_lora_weights={start} cannot be merged here"):
        adapter.merge(tmp_path, tiny_model, tmp_path, 1 << 30)


def sft_adapter(folder, base, **options):
    return checkpoint(folder, lambda place: lora(place, base, **options) is None, stage="sft")


def test_an_adapter_on_an_adapter_is_merged_with_both(tmp_path, tiny_model):
    """By peft: the SFT adapter merged into the tiny model, then the policy's into that."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft = sft_adapter(tmp_path / "sft", tiny_model, **NEOX)
    whole = tmp_path / "whole"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), sft)
    model.merge_and_unload().save_pretrained(whole)
    shutil.copy(tiny_model / "tokenizer.json", whole)
    shutil.copy(tiny_model / "tokenizer_config.json", whole)
    expected = {}

    def fill(folder):
        expected["logits"] = lora(folder, whole, **{**NEOX, "r": 2})
        config = json.loads((folder / adapter.CONFIG).read_text())
        config["base_model_name_or_path"] = str(sft)
        (folder / adapter.CONFIG).write_text(json.dumps(config))

    parents = {"base": read_manifest(sft).content_hash}
    published(checkpoint(tmp_path / "policy", fill, parents=parents), tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {*READ_BY_VLLM, "model.safetensors", "README.md"}
    assert torch.allclose(logits(tmp_path / "model"), expected["logits"], atol=1e-5)


def test_an_adapter_is_not_merged_into_a_base_that_was_trained_again(tmp_path, tiny_model):
    base = checkpoint(tmp_path / "sft", stage="sft")
    policy = checkpoint(
        tmp_path / "policy",
        lambda folder: lora(folder, base, **NEOX) is None,
        parents={"base": read_manifest(base).content_hash},
    )
    published(policy, tmp_path / "model")

    def other(folder):
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    checkpoint(base, other, stage="sft")
    with pytest.raises(ArtifactError, match="was trained on other weights"):
        published(policy, tmp_path / "again")
