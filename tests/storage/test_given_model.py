"""Models that nobody's step of ours made: taken by their content, or refused in one message."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.errors import DpoError
from dpo.modeling.load import load_model
from dpo.storage import given_model
from dpo.storage.given_model import FOREIGN, read_model
from dpo.storage.manifest import content_hash, list_files, staged, write_manifest
from dpo.storage.remote import fetch_model


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "theirs")


def adapter_of(base, target):
    """An adapter's folder; its weights are only looked at."""
    target.mkdir()
    values = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (target / "adapter_config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, target / name)
    shutil.copy(base / "model.safetensors", target / "adapter_model.safetensors")
    return target


def test_a_foreign_folder_is_known_by_what_loading_reads(folder):
    found = read_model(folder)
    assert found.stage == FOREIGN
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert {entry.path: entry.sha256 for entry in found.files}["model.safetensors"] == weights
    # what trainers and downloads leave beside a model is none of it
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2/model.safetensors").touch()
    (folder / ".cache/huggingface").mkdir(parents=True)
    left = ("trainer_state.json", "training_args.bin", "all_results.json", "README.md")
    for name in (*left, "running_log.txt", "trainer_log.jsonl", "tokens_state.json"):
        (folder / name).write_text("{}")
    # a file of that name which is no manifest of ours
    (folder / "manifest.json").write_text('{"name": "an app"}')
    assert read_model(folder).content_hash == found.content_hash
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert read_model(folder).content_hash != found.content_hash


def test_the_weights_that_are_hashed_are_those_that_are_loaded(folder):
    """Where there are both, transformers takes the one file and does not look at the index."""
    weights = load_file(folder / "model.safetensors")
    metadata, shard = {"format": "pt"}, "model-00001-of-00001.safetensors"
    zeros = {name: torch.zeros_like(values) for name, values in weights.items()}
    save_file(zeros, folder / shard, metadata=metadata)
    index = {"weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_model(folder, torch.float32).state_dict()
    hashed = {entry.path for entry in read_model(folder).files if "safetensors" in entry.path}
    assert hashed == {"model.safetensors" if any(map(torch.any, loaded.values())) else shard}


@pytest.mark.parametrize("made_by", ["another program", "a step", "publish"])
def test_nodes_fetch_any_model_from_the_store(folder, tmp_path, made_by):
    if made_by == "a step":
        write_manifest(folder, "sft")
    if made_by == "publish":
        files = [asdict(entry) for entry in list_files(folder)]
        hashes = {entry["path"]: entry["sha256"] for entry in files}
        values = {"name": "policy", "content_hash": content_hash(hashes), "files": files}
        (folder / "manifest.json").write_text(json.dumps({"format_version": 3, **values}))
    expected = read_model(folder)
    if made_by == "another program":
        (folder / "checkpoint-2").mkdir()
        for name in ("checkpoint-2/model.safetensors", "optimizer.pt"):
            (folder / name).touch()
    fetch_model(folder.as_uri(), tmp_path / "base")
    found = read_model(tmp_path / "base")
    assert (found.stage, found.content_hash) == (expected.stage, expected.content_hash)
    assert {path.suffix for path in (tmp_path / "base").rglob("*")} <= {".json", ".safetensors"}


def test_a_large_model_is_read_once_and_with_a_word(folder, monkeypatch, capsys):
    monkeypatch.setattr(given_model, "_SAID_FROM_BYTES", 1)
    found = read_model(folder, "policy")
    assert "policy: reading 0 GiB to tell which model it is" in capsys.readouterr().err
    monkeypatch.setattr(given_model, "hashed", lambda place, paths: pytest.fail(str(paths)))
    monkeypatch.setattr(given_model, "_whole", lambda *_: "")
    assert read_model(folder, "policy").content_hash == found.content_hash
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    with pytest.raises(pytest.fail.Exception, match="safetensors"):
        read_model(folder, "policy")


def test_its_record_goes_into_the_lineage_of_what_is_made_of_it(folder, tmp_path):
    given = read_model(folder)
    with staged(tmp_path / "output") as output:
        made = write_manifest(output, "sft", inputs={"base": given.content_hash})
    record = made.lineage[given.content_hash]
    assert record["step"] == FOREIGN
    assert record["sources"] == {"folder": "theirs", "model_type": "gpt_neox", "dtype": "float32"}


def test_an_adapters_base_is_part_of_what_it_is(folder, tmp_path):
    adapter = adapter_of(folder, tmp_path / "adapter")
    base = read_model(folder).content_hash
    known = read_model(adapter)
    assert known.inputs == {"base": base}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    # the adapter has a tokenizer: its base needs none
    assert read_model(adapter).inputs["base"] != base
    # its own files are the same, and it is another model
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert read_model(adapter).content_hash != known.content_hash


def test_an_adapter_stays_one_with_its_bases_configuration_beside_it(folder, tmp_path):
    """So some trainers save it; taken for a whole model its weights would be missing."""
    adapter = adapter_of(folder, tmp_path / "adapter")
    shutil.copy(folder / "config.json", adapter)
    found = read_model(adapter)
    assert found.inputs == {"base": read_model(folder).content_hash}
    assert "adapter_model.safetensors" in {entry.path for entry in found.files}


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def only_gguf(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "model-Q4.gguf").touch()


def only_checkpoints(folder):
    inner = folder / "checkpoint-500"
    inner.mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(inner / path.name)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00002.bin")


def lost_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weights = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


def other_weights(folder):
    values = json.loads((folder / "config.json").read_text())
    values["transformers_weights"] = "consolidated.safetensors"
    (folder / "config.json").write_text(json.dumps(values))


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_adapter(folder):
    adapter = adapter_of(folder, folder / "a")
    for path in adapter.iterdir():
        path.replace(folder / path.name)


def of_ingest(folder):
    write_manifest(folder, "ingest")


def old_adapter(folder):
    adapter_of(folder, folder / "a")
    for path in folder.glob("*.*"):
        path.unlink()
    for path in (folder / "a").iterdir():
        path.rename(folder / path.name)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (shutil.rmtree, "there is no such folder for sft"),
        (only_gguf, "sft is no model's folder: model-Q4.gguf is made for inference"),
        (only_checkpoints, "it holds folders of models (checkpoint-500)"),
        (remove("config.json"), "sft is no model's folder: config.json is missing"),
        (remove("model.safetensors"), "the model's weights are missing"),
        (remove("tokenizer.json", "tokenizer_config.json"), "sft has no tokenizer"),
        (pickled, "pytorch_model-00001-of-00002.bin is a pickle, which is not loaded"),
        (lost_shard, "a file of weights is missing: model-2.safetensors"),
        (with_adapter, "a whole model and an adapter, and nothing says which"),
        (other_weights, "the weights are in consolidated.safetensors"),
        (cut_off, "a file of weights is damaged"),
        (of_ingest, "sft must be a model, and this is the output of step ingest"),
        (old_adapter, "adapter_model.bin is a pickle"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_message(folder, change, expected):
    change(folder)
    with pytest.raises(DpoError) as caught:
        read_model(folder, "sft")
    assert expected in caught.value.found
    assert caught.value.fix
