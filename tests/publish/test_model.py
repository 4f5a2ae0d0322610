"""What is published of a checkpoint: a folder that loads, in shards, as or without an adapter."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.numpy import save_file

from dpo.config.compose import compose
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.errors import ArtifactError, ConfigError
from dpo.publish import adapter, card
from dpo.publish.folder import DIALOGUE_TEMPLATE, gathered
from dpo.publish.tensors import model_tensors, read_tensors, write_model
from dpo.storage.manifest import content_hash, list_files, read_manifest, staged, write_manifest

# peft 0.18 reads an attribute that transformers 5 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# what vLLM opens of a model's folder: its loader, its tokenizer, its chat template
READ_BY_VLLM = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "chat_template.jinja",
}


def checkpoint(folder, fill=None, *, loss=None, parents=None):
    with staged(folder) as partial:
        if fill:
            fill(partial)
        else:
            shutil.copytree(builtin("builtin:tiny"), partial, dirs_exist_ok=True)
        settings = {"loss": loss or {"name": "dpo", "beta": 0.1}, "optimizer": "AdamW", "lr": 1e-5}
        record = {"config": settings, "examples": 8, "steps": 2, "data_fingerprint": "d" * 64}
        (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
        write_manifest(partial, "preference", inputs=parents)
    return folder


def settings(*overrides):
    return restrict(compose(["model=tiny", *overrides]).config, "publish")


def published(policy, target, *overrides):
    """The published files, as a folder of their own; and the version's hash."""
    with gathered(policy, settings(*overrides)) as (folder, files):
        shutil.copytree(folder, target)
        assert [(e.path, e.size, e.sha256) for e in list_files(target)] == [
            (e.path, e.size, e.sha256) for e in files
        ]
        return content_hash({entry.path: entry.sha256 for entry in files})


def logits(folder, load=None):
    from transformers import AutoModelForCausalLM

    model = (load or AutoModelForCausalLM.from_pretrained)(str(folder))
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def test_it_loads_in_transformers_and_has_what_vllm_reads(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    policy = checkpoint(tmp_path / "policy")
    published(policy, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {*READ_BY_VLLM, "model.safetensors", "README.md"}
    assert torch.equal(logits(tmp_path / "model"), logits(policy))
    GenerationConfig.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Why?"},
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "\n\nHuman: Hello\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant:"


def test_a_chat_template_of_its_own_stays(tmp_path):
    def fill(folder):
        shutil.copytree(builtin("builtin:tiny"), folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    published(checkpoint(tmp_path / "policy", fill), tmp_path / "model")
    kept = (tmp_path / "model/chat_template.jinja").read_text()
    assert kept == "{{ messages[0]['content'] }}" != DIALOGUE_TEMPLATE


def test_equal_runs_on_other_machines_have_equal_hashes(tmp_path):
    """Where the tokenizer was loaded from, when, and how fast, is no part of the content."""

    def fill(where, number):
        def write(folder):
            shutil.copytree(builtin("builtin:tiny"), folder, dirs_exist_ok=True)
            for name in ("config.json", "tokenizer_config.json"):
                values = json.loads((folder / name).read_text())
                values |= {"_name_or_path": where, "is_local": bool(number)}
                (folder / name).write_text(json.dumps(values))
            (folder / "metrics.jsonl").write_text(f'{{"time": {number}}}\n')

        return write

    hashes = set()
    for number, where in enumerate(("/home/me/sft", "/tmp/other")):
        policy = checkpoint(tmp_path / f"policy-{number}", fill(where, number))
        hashes.add(published(policy, tmp_path / f"model-{number}"))
        text = "".join(p.read_text() for p in (tmp_path / f"model-{number}").glob("*.[jm][sd]*"))
        assert where not in text
    assert len(hashes) == 1


def test_another_weight_gives_another_hash(tmp_path):
    def fill(folder):
        shutil.copytree(builtin("builtin:tiny"), folder, dirs_exist_ok=True)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    first = published(checkpoint(tmp_path / "a"), tmp_path / "model-a")
    second = published(checkpoint(tmp_path / "b", fill), tmp_path / "model-b")
    assert first != second


def test_large_weights_are_divided(tmp_path):
    """3 MiB of weights in files of at most 1 MiB; the same numbers come back."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    def fill(folder):
        shutil.copytree(builtin("builtin:tiny"), folder, dirs_exist_ok=True)
        (folder / "model.safetensors").unlink()
        torch.manual_seed(0)
        config = GPTNeoXConfig.from_pretrained(folder)
        config.hidden_size, config.intermediate_size = 128, 256
        GPTNeoXForCausalLM(config).save_pretrained(folder)

    policy = checkpoint(tmp_path / "policy", fill)
    published(policy, tmp_path / "model", "publish.max_shard_mib=1")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) >= 2
    # a header of a few hundred bytes comes on top of the tensors
    assert all(path.stat().st_size <= (1 << 20) + 4096 for path in shards)
    assert not (tmp_path / "model/model.safetensors").exists()
    assert torch.equal(logits(tmp_path / "model"), logits(policy))


def test_shards_as_the_safetensors_package_reads_them(tmp_path):
    """By hand: 4 tensors of 400 bytes and at most 800 bytes a shard make 2 shards."""
    tensors = {f"t{n}": np.full((10, 10), n, np.float32) for n in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = list(read_tensors(tmp_path / "model.safetensors").values())
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", found, 800)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["metadata"]["total_size"] == 1600
    assert index["weight_map"] == {"t0": first, "t1": first, "t2": second, "t3": second}
    for name, values in tensors.items():
        with safe_open(tmp_path / "out" / index["weight_map"][name], "np") as file:
            assert np.array_equal(file.get_tensor(name), values)
    assert set(model_tensors(tmp_path / "out")) == set(tensors)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer_config.json", None, "no tokenizer_config.json"),
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "no weights"),
        ("model.safetensors", lambda data: data[:-4], "is damaged"),
        ("model.safetensors", lambda data: b"\xff" * 16 + data[16:], "is damaged"),
        ("config.json", lambda data: b"[]", "no JSON object"),
        ("config.json", lambda data: b"{", "not JSON"),
        ("config.json", lambda data: b"{}", "no architecture"),
    ],
)
def test_what_is_not_a_whole_model_is_refused(tmp_path, name, damage, words):
    def fill(folder):
        shutil.copytree(builtin("builtin:tiny"), folder, dirs_exist_ok=True)
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if damage:
            (folder / name).write_bytes(damage(data))

    with pytest.raises(ArtifactError, match=words):
        published(checkpoint(tmp_path / "policy", fill), tmp_path / "model")


def test_an_index_that_lies_is_found(tmp_path):
    tensors = {f"t{n}": np.zeros(10, np.float32) for n in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    write_model(tmp_path, list(read_tensors(tmp_path / "model.safetensors").values()), 40)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["t0"] = values["weight_map"]["t1"]
    index.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="t0 is not where the index says"):
        model_tensors(tmp_path)


# --- adapters ---


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
    ],
    ids=["plain", "rank-stabilised", "patterns"],
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


# --- the card ---


@pytest.fixture
def text(tmp_path):
    policy = checkpoint(tmp_path / "policy")
    manifest = read_manifest(policy)
    return card.model_card(policy, manifest, "policy", "HuggingFaceTB/SmolLM2-135M-Instruct", "")


def test_the_card_says_what_a_reader_needs(text):
    card.check_card(text, "here")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "apache-2.0"
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert ModelCard(text).data.to_dict()["library_name"] == "transformers"
    for words in ("## Data", "## Licence", "## Intended use", "manifest.json", "runs/"):
        assert words in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("---\n\n#", "\n\n#", "no metadata block"),
        ('license: "apache-2.0"\n', "", "no license"),
        ("## Data", "## Pairs", "no section Data"),
        ("## Limits\n", "## Limits\nsee /home/me/run\n", "an absolute path"),
        ("## Limits\n", "## Limits\n![plot](x.png)\n", "an image"),
        ('"HuggingFaceTB/SmolLM2-135M-Instruct"', '"/models/mine"', "no id of a hub"),
        ("library_name:", ":\t{", "not YAML|no mapping"),
    ],
)
def test_a_card_that_lacks_something_is_refused(text, old, new, words):
    assert old in text
    with pytest.raises(ArtifactError, match=words):
        card.check_card(text.replace(old, new, 1), "here")


def test_a_base_model_of_ones_own_leaves_no_path_in_the_card(tmp_path):
    policy = checkpoint(tmp_path / "policy")
    manifest = read_manifest(policy)
    found = card.model_card(policy, manifest, "policy", str(tmp_path), "")
    card.check_card(found, "here")
    assert str(tmp_path) not in found
    assert "license_name" in found


def made_of(folder, base, *, before):
    """A policy whose own settings name ``gpt2``, of a chain of artifacts that began with ``base``.

    ``before``: the input by which each artifact names the one before it, the policy's first.
    """
    lineage, hashes = {}, ["a" * 64, "b" * 64, "c" * 64]
    for number, hash_ in enumerate(hashes[: len(before)]):
        first = number == len(before) - 1
        settings = {"model": {"name_or_path": base if first else "gpt2"}}
        parents = {} if first else {before[number + 1]: hashes[number + 1]}
        lineage[hash_] = {"step": "sft", "configuration": settings, "parents": parents}
    checkpoint(folder)
    settings = {"model": {"name_or_path": "gpt2"}}
    (folder / "manifest.json").unlink()
    parents = {before[0]: hashes[0]} if before else {}
    write_manifest(folder, "preference", settings=settings, inputs=parents, lineage=lineage)
    return folder


@pytest.mark.parametrize("before", [["base"], ["base", "policy", "base"]])
def test_the_card_names_the_base_that_the_weights_began_with(tmp_path, before):
    policy = made_of(tmp_path / "policy", "org/began-with", before=before)
    published(policy, tmp_path / "out", "model=smollm2")
    metadata = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert metadata["base_model"] == "org/began-with"
    assert metadata["license"] == "other"


def test_the_card_names_no_base_where_the_lineage_does_not_reach_it(tmp_path):
    policy = made_of(tmp_path / "policy", "org/began-with", before=["base", "base"])
    manifest = json.loads((policy / "manifest.json").read_text())
    del manifest["lineage"]["b" * 64]
    (policy / "manifest.json").write_text(json.dumps(manifest))
    published(policy, tmp_path / "out", "model=smollm2")
    text = (tmp_path / "out/README.md").read_text()
    assert "base_model" not in text
    assert "Base model: a model of one's own" in text


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ArtifactError, match="header is longer"):
        read_tensors(path)
