"""What is published of a checkpoint: a folder that loads, with weights in shards."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from dpo.config.places import builtin
from dpo.errors import ArtifactError
from dpo.publish.folder import DIALOGUE_TEMPLATE
from dpo.publish.tensors import model_tensors, read_tensors, write_model
from tests.publish.checkpoints import READ_BY_VLLM, checkpoint, logits, published


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


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ArtifactError, match="header is longer"):
        read_tensors(path)
