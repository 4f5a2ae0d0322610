"""``dpo export``: a checkpoint as policy.pt, read back here and as the reference code reads it."""

import json
import resource

import pytest
import torch

from dpo.cli import main
from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.modeling.load import load_for_training, load_model, save_model

TINY = builtin("builtin:tiny")


@pytest.fixture
def checkpoint(tmp_path):
    model, tokenizer = load_for_training(ModelConfig(), None)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.25
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_model(model, tokenizer, folder)
    record = {"examples": 48, "metrics": {"loss/train": 0.5, "note": "text"}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder, model.state_dict()


def test_round_trip(checkpoint, tmp_path, capsys):
    folder, weights = checkpoint
    path = tmp_path / "new" / "policy.pt"
    assert main(["export", f"checkpoint={folder}", f"output={path}"]) == 0
    assert "policy.pt" in capsys.readouterr().out
    assert [item.name for item in path.parent.iterdir()] == ["policy.pt"]
    again, _ = load_for_training(ModelConfig(archive=str(path)), None)
    torch.testing.assert_close(again.state_dict(), weights, rtol=0, atol=0)


def test_the_reference_code_reads_it(checkpoint, tmp_path):
    """train.py: state_dict = torch.load(archive); policy.load_state_dict(state_dict['state'])."""
    folder, weights = checkpoint
    path = tmp_path / "policy.pt"
    main(["export", f"checkpoint={folder}", f"output={path}"])
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    assert set(loaded) == {"step_idx", "state", "metrics"}
    assert loaded["step_idx"] == 48
    assert loaded["metrics"] == {"loss/train": 0.5}
    model = load_model(TINY, torch.float32)
    model.load_state_dict(loaded["state"], strict=True)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint={tmp}/nothing", "output={tmp}/policy.pt"], "config.json is missing"),
        (["checkpoint={folder}", "output={tmp}"], "a policy.pt is a file"),
        (["checkpoint={folder}"], "needs output="),
        (
            ["checkpoint={folder}", "output={folder}/model.safetensors"],
            "a file of the checkpoint would be replaced",
        ),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, capsys, words, message):
    folder, _ = checkpoint
    given = [word.format(tmp=tmp_path, folder=folder) for word in words]
    assert main(["export", *given]) != 0
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_disk_without_room_is_one_message(checkpoint, tmp_path, capsys):
    """torch's own writer says "unexpected pos" of it; here the system allows no larger file."""
    folder, _ = checkpoint
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert main(["export", f"checkpoint={folder}", f"output={tmp_path}/out/policy.pt"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shown = capsys.readouterr().err
    assert shown.startswith("dpo: File too large")
    assert str(tmp_path / "out/policy.pt") in shown
    assert list((tmp_path / "out").iterdir()) == []


CODE = """
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


class OwnConfig(GPTNeoXConfig):
    model_type = "own_neox"


class Own(GPTNeoXForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_exported_where_that_is_allowed(tmp_path, capsys):
    """The message named a setting that was not read."""
    folder = tmp_path / "own"
    model = load_model(TINY, torch.float32)
    model.save_pretrained(folder, save_original_format=False)
    (folder / "modeling_own.py").write_text(CODE)
    values = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    values |= {"model_type": "own_neox", "architectures": ["Own"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(values))
    command = ["export", f"checkpoint={folder}", f"output={tmp_path / 'policy.pt'}"]
    assert main(command) == 1
    assert "set model.trust_remote_code=true" in capsys.readouterr().err
    assert main([*command, "model.trust_remote_code=true"]) == 0
    found = torch.load(tmp_path / "policy.pt", weights_only=True)["state"]
    torch.testing.assert_close(found, dict(model.state_dict()), rtol=0, atol=0)
