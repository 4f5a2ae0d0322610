"""A model that another program trained, evaluated and approved here, is published as what it is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ArtifactError
from dpo.publish import folder as publishing
from dpo.publish.stage import run_publish
from dpo.publish.verify import pull
from dpo.storage.given_model import read_model
from tests.publish.pipeline import output
from tests.publish.test_adapters import NEOX, lora
from tests.storage.test_given_model import adapter_of


def judged(folder, policy):
    """Evaluation and verdict of a policy, as the steps write them."""
    figures = {"evaluation.json": {"n_pairs": 1}, "report.html": "<p>"}
    inputs = {"policy": read_model(policy).content_hash}
    evaluation = output(folder / "evaluation", "evaluate", figures, inputs=inputs)
    output(
        folder / "verdict",
        "gate",
        {"verdict.json": {}},
        inputs={"evaluation": evaluation.content_hash},
        details={"approved": True},
    )
    return {name: folder / name for name in ("evaluation", "verdict")}


def publish(tmp_path, policy, paths, *settings):
    config = compose([f"publish.store='file://{tmp_path}/store'", *settings]).config
    config = restrict(config, "publish")
    return run_publish(config, tmp_path / "out", policy=policy, run_id="", **paths)


def test_it_is_published_and_comes_back_with_a_card_that_claims_nothing(tmp_path, tiny_model):
    policy = shutil.copytree(tiny_model, tmp_path / "theirs")
    publish(tmp_path, policy, judged(tmp_path, policy))
    found = pull(f"file://{tmp_path}/store/policy", tmp_path / "back")
    assert found["policy"] == read_model(policy).content_hash
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (policy, tmp_path / "back")
    ]
    assert weights[0] == weights[1]
    card = (tmp_path / "back/README.md").read_text(encoding="utf-8")
    assert "whose training is not recorded here" in card
    # neither the settings' base model nor a template that nobody knows it was trained with
    assert "base_model" not in card
    assert "builtin:" not in card
    assert not (tmp_path / "back/chat_template.jinja").exists()


def test_a_folder_that_changed_after_the_evaluation_is_refused(tmp_path, tiny_model):
    policy = shutil.copytree(tiny_model, tmp_path / "theirs")
    paths = judged(tmp_path, policy)
    (policy / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    with pytest.raises(ArtifactError, match="the evaluation is of another policy"):
        publish(tmp_path, policy, paths)


def test_a_version_that_was_published_before_needs_no_record_of_its_training(tmp_path, tiny_model):
    policy = shutil.copytree(tiny_model, tmp_path / "theirs")
    publish(tmp_path, policy, judged(tmp_path, policy))
    (version,) = (path for path in (tmp_path / "store/policy").iterdir() if path.is_dir())
    copied = shutil.copytree(version, tmp_path / "copied")
    assert read_model(copied).stage == "published"
    again = tmp_path / "again"
    again.mkdir()
    publish(again, copied, judged(again, copied))
    pull(f"file://{again}/store/policy", again / "back")
    assert "not recorded here" in (again / "back/README.md").read_text(encoding="utf-8")
    (copied / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        read_model(copied)


@pytest.mark.parametrize("named", ["builtin:tiny", "a folder"])
def test_an_adapter_of_another_program_goes_on_naming_a_base_that_others_find(
    tmp_path, tiny_model, named
):
    base = shutil.copytree(tiny_model, tmp_path / "base") if named == "a folder" else named
    policy = adapter_of(tiny_model, tmp_path / "theirs")
    values = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (policy / "adapter_config.json").write_text(json.dumps(values))
    publish(tmp_path, policy, judged(tmp_path, policy), "publish.lora=adapter")
    pull(f"file://{tmp_path}/store/policy", tmp_path / "back")
    hashed = read_model(tiny_model).content_hash
    config = json.loads((tmp_path / "back/adapter_config.json").read_text(encoding="utf-8"))
    found = named != "a folder"
    assert config["base_model_name_or_path"] == (named if found else f"sft-checkpoint-{hashed}")
    needed = named if found else f"the model with content hash `{hashed}`"
    card = (tmp_path / "back/README.md").read_text(encoding="utf-8")
    assert f"needs its base: {needed}." in card


def test_shards_are_made_of_what_was_evaluated_alone(tmp_path, tiny_model, monkeypatch):
    policy = shutil.copytree(tiny_model, tmp_path / "theirs")
    weights = load_file(policy / "model.safetensors")
    weights = {name: values.double() for name, values in weights.items()}
    save_file(weights, policy / "model.safetensors", metadata={"format": "pt"})
    paths = judged(tmp_path, policy)
    link = publishing._link

    def changed_meanwhile(*given):
        found = link(*given)
        weights = policy / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        return found

    monkeypatch.setattr(publishing, "_link", changed_meanwhile)
    with pytest.raises(ArtifactError, match="changed while it was published"):
        publish(tmp_path, policy, paths, "publish.max_shard_mib=1")


# peft reads an attribute that transformers 5 deprecates
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_on_an_adapter_that_its_bases_configuration_lies_beside_is_merged(
    tmp_path, tiny_model
):
    """As trainers save them: config.json makes an adapter's folder no whole model."""
    inner, outer = (tmp_path / name for name in ("inner", "outer"))
    lora(inner, tiny_model, **NEOX)
    alone = adapted(tmp_path / "one", inner)
    shutil.copy(tiny_model / "config.json", inner)
    lora(outer, tiny_model, **NEOX)
    config = json.loads((outer / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(inner)
    (outer / "adapter_config.json").write_text(json.dumps(config))
    both = adapted(tmp_path / "two", outer)
    weights = load_file(tiny_model / "model.safetensors")
    # equal adapters: together they change each weight twice as much as one does
    for name, before in weights.items():
        assert torch.allclose(both[name] - before, 2 * (alone[name] - before), atol=1e-5)
    assert any(not torch.equal(before, both[name]) for name, before in weights.items())


def adapted(place, policy):
    """The weights that are published of an adapter."""
    place.mkdir()
    publish(place, policy, judged(place, policy))
    pull(f"file://{place}/store/policy", place / "back")
    return load_file(place / "back/model.safetensors")
