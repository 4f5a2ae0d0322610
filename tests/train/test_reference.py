"""The reference's log-probabilities do not depend on how many processes make them."""

import json
import shutil
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from dpo.config.compose import compose
from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.data.log_probs import read_log_probs
from dpo.errors import InvariantError, ModelError, NonFiniteError
from dpo.modeling import sharded
from dpo.modeling.budget import scoring_budget
from dpo.storage.manifest import read_manifest
from dpo.train import reference, stage
from dpo.train.reference import run_reference
from dpo.train.stage import run_train
from dpo.train.start import check_starting_point, rounded_otherwise
from tests.train.conftest import SETTINGS

FSDP = "trainer=FSDPTrainer"


def config_of(*settings):
    return restrict(compose([*SETTINGS, FSDP, *settings]).config, "reference")


def test_two_processes_score_what_one_scores(prepared, tmp_path, monkeypatch):
    """More pairs than two shares of a round, and an odd number of them."""
    config = config_of("n_examples=600", "n_eval_examples=7")
    found = {}
    for processes in ("1", "2"):
        monkeypatch.setenv("DPO_PROCESSES", processes)
        run_reference(config, tmp_path / processes, pairs=prepared.data, model=prepared.sft)
        found[processes] = read_log_probs(tmp_path / processes)
    one, two = found["1"], found["2"]
    assert len(one) == 607 > 2 * sharded._SHARE
    assert len(one) % 2 == 1
    # also the order on disk
    assert list(one) == list(two)
    for pair_id, expected in one.items():
        seen = two[pair_id]
        assert (seen.split, seen.tokens_hash) == (expected.split, expected.tokens_hash)
        np.testing.assert_allclose(seen.chosen, expected.chosen, atol=1e-5, rtol=0)
        np.testing.assert_allclose(seen.rejected, expected.rejected, atol=1e-5, rtol=0)
    manifests = [read_manifest(tmp_path / name, stage="reference") for name in found]
    assert manifests[0].settings == manifests[1].settings
    assert manifests[0].inputs == manifests[1].inputs


def test_a_basic_trainer_is_one_process(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PROCESSES", "2")
    monkeypatch.setattr(reference, "launch", pytest.fail)
    config = config_of("trainer=BasicTrainer", "n_examples=8")
    run_reference(config, tmp_path / "out", pairs=prepared.data, model=prepared.sft)
    assert len(read_log_probs(tmp_path / "out")) == 13


def test_on_a_gpu_it_chooses_its_rows_without_settings_of_training(prepared, tmp_path, monkeypatch):
    """It reads none: the step ended in an AttributeError on every GPU."""
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    chosen = []

    def on_gpu(config, model, device):
        chosen.append(scoring_budget(config, model, "cuda"))
        return chosen[-1]

    monkeypatch.setattr(reference, "scoring_budget", on_gpu)
    config = config_of("trainer=BasicTrainer", "n_examples=8", "model.compute_dtype=float32")
    run_reference(config, tmp_path / "out", pairs=prepared.data, model=prepared.sft)
    assert chosen == [16384]


def test_a_process_that_fails_is_one_message(prepared, tmp_path, monkeypatch):
    """And leaves nothing: torch's agent made a folder of its own in /tmp for every run."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("DPO_PROCESSES", "2")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = config_of("n_examples=8").model_copy(
        update={"model": config_of().model.model_copy(update={"name_or_path": str(broken)})}
    )
    with pytest.raises(ModelError, match="weights are missing"):
        run_reference(config, tmp_path / "out", pairs=prepared.data)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in temporary.iterdir() if "inductor" not in path.name] == []


@pytest.mark.parametrize("stage", ["reference", "sft"])
def test_weights_of_nan_are_named_before_anything_is_kept(stage, prepared, tmp_path):
    folder = shutil.copytree(builtin("builtin:tiny"), tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"][0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    words = [*SETTINGS, f"model.name_or_path={folder}", "n_examples=8"]
    config = restrict(compose([*words, *(["loss=sft"] if stage == "sft" else [])]).config, stage)
    run = run_reference if stage == "reference" else run_train
    expected = {"reference": r"of 13 of 13 pairs are not finite", "sft": "begins with hold NaN"}
    with pytest.raises(NonFiniteError, match=expected[stage]):
        run(config, tmp_path / "out", pairs=prepared.data)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_told_before_the_pairs_are_scored(
    prepared, tmp_path, monkeypatch
):
    """It was told after it, and hours of scoring were lost; here a file is where a folder goes."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(reference, "score_shared", lambda *_, **__: 1 / 0)
    config = restrict(compose(SETTINGS).config, "reference")
    with pytest.raises(OSError, match="file"):
        run_reference(config, tmp_path / "file/out", pairs=prepared.data, model=prepared.sft)


@pytest.mark.parametrize(("noise", "said"), [(0.0, False), (0.02, True)])
def test_a_reference_that_was_rounded_otherwise_is_said_once(
    noise, said, prepared, tmp_path, monkeypatch, capsys
):
    """As where whole models score what is trained in float16 shards: accuracies of the first steps
    are 0.2 to 0.8 where 0 is meant, and nothing said why."""
    given = stage.select_log_probs

    def rounded(*arguments):
        rows = given(*arguments)
        return [replace(row, chosen=row.chosen + noise / len(row.chosen)) for row in rows]

    monkeypatch.setattr(stage, "select_log_probs", rounded)
    monkeypatch.setattr(stage, "compute_dtype", lambda *_: torch.bfloat16)
    words = [*SETTINGS, "n_examples=16", "loss=dpo"]
    config = restrict(compose(words).config, "preference")
    run_reference(
        config_of("n_examples=16", "model.compute_dtype=bfloat16"),
        tmp_path / "reference",
        pairs=prepared.data,
        model=prepared.sft,
    )
    paths = {**prepared.paths(sft=False), "reference": tmp_path / "reference"}
    run_train(config, tmp_path / "model", **paths)
    lines = [line for line in capsys.readouterr().err.splitlines() if "rounded otherwise" in line]
    assert len(lines) == said
    if said:
        assert "log-ratios of up to 0.02 before the first update" in lines[0]


def test_types_that_differ_are_named_where_a_reference_was_rounded_otherwise():
    """model.policy_dtype=bfloat16 alone leaves the reference at float32."""
    told = rounded_otherwise(0.02, ModelConfig(policy_dtype="bfloat16"))
    assert "(model.policy_dtype=bfloat16, model.reference_dtype=float32:" in told
    assert "log-ratios of up to 0.02 before the first update" in told
    assert "dtype" not in rounded_otherwise(0.02, ModelConfig())


def test_a_reference_of_a_machine_with_other_products_is_told_as_that(prepared, tmp_path):
    """Nodes of two kinds: `auto` is bfloat16 on the one and float32 on the other, and to run the
    reference again need not help."""
    run_reference(
        config_of("n_examples=16", "model.compute_dtype=bfloat16"),
        tmp_path / "reference",
        pairs=prepared.data,
        model=prepared.sft,
    )
    made = read_manifest(tmp_path / "reference", stage="reference")
    assert made.details["compute_dtype"] == "bfloat16"
    words = [*SETTINGS, "n_examples=16", "loss=dpo", "model.compute_dtype=float32"]
    config = restrict(compose(words).config, "preference")
    paths = {**prepared.paths(sft=False), "reference": tmp_path / "reference"}
    with pytest.raises(InvariantError, match="differ before training") as caught:
        run_train(config, tmp_path / "model", **paths)
    assert "products in bfloat16, this training has float32" in caught.value.fix
    # which takes them from the one machine to the other as well, by explicit choice
    assert "model.reference_dtype is another type" in caught.value.fix


def test_the_type_is_no_reason_where_the_tolerance_has_room_for_it():
    """4e-3 of 100 is what products of 16 bits may differ by; 5 is another model."""
    figures = {f"logps_train/{side}": torch.tensor([-100.0]) for side in ("chosen", "rejected")}
    figures["rewards_train/margins"] = torch.tensor([0.5])
    loss = compose(["loss=dpo", "loss.beta=0.1"]).config.loss
    with pytest.raises(InvariantError, match="a log-ratio of 5 where 0") as caught:
        check_starting_point(figures, loss, torch.bfloat16, "float32")
    assert "other weights, tokens or types" in caught.value.fix
