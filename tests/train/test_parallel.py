"""FSDP over processes gives the trajectory of one process."""

import json
import sys

import pytest
from safetensors.numpy import load_file

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ConfigError, MissingDependency, ModelError
from dpo.train.launch import processes_here
from dpo.train.stage import run_train
from tests.train.conftest import SETTINGS

# 22 examples in batches of 8: the last one has 6, three for each of two processes
# RMSprop makes full steps of elements whose gradient is all rounding, so also two ways to split the
# work of one process drift apart; a small rate keeps that below what is compared
RUN = [
    *(*SETTINGS, "n_examples=22", "gradient_accumulation_steps=2", "checkpoint_seconds=0"),
    "lr=1e-6",
]


def config_of(loss, *more):
    stage = "sft" if loss == "sft" else "preference"
    return restrict(compose([*RUN, f"loss={loss}", *more]).config, stage)


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(one, many):
    left, right = log_of(one), log_of(many)
    assert len(left) == len(right)
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.keys() == b.keys()
        # accuracies of the first step are decided by rounding: its margins are 0
        for key in a.keys() - {"examples_per_second", "rewards_train/accuracies"}:
            near = 1e-4 if number == 0 else 2e-3
            assert b[key] == pytest.approx(a[key], rel=near, abs=near), key
    a, b = load_file(one / "model.safetensors"), load_file(many / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert b[name] == pytest.approx(a[name], abs=5e-4), name


@pytest.mark.parametrize(
    ("loss", "processes"),
    [
        ("dpo", 2),
        pytest.param("sft", 2, marks=pytest.mark.long),
        pytest.param("ipo", 2, marks=pytest.mark.long),
        pytest.param("simpo", 2, marks=pytest.mark.long),
        pytest.param("orpo", 2, marks=pytest.mark.long),
        pytest.param("dpo", 4, marks=pytest.mark.long),
    ],
)
def test_many_processes_follow_one(loss, processes, prepared, tmp_path, monkeypatch):
    paths = prepared.paths(sft=loss == "sft")
    run_train(config_of(loss), tmp_path / "one", **paths)
    monkeypatch.setenv("DPO_PROCESSES", str(processes))
    more = ["trainer=FSDPTrainer"]
    if processes == 4:
        more += ["gradient_accumulation_steps=1"]
    run_train(config_of(loss, *more), tmp_path / "many", **paths)
    compare(tmp_path / "one", tmp_path / "many")


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("gradient_accumulation_steps=8", ConfigError, "multiple of 16"),
        ("model.block_name=NoSuchBlock", ModelError, "GPTNeoXLayer"),
    ],
)
def test_a_child_fails_with_its_own_message(setting, error, words, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PROCESSES", "2")
    config = config_of("sft", "trainer=FSDPTrainer", setting)
    with pytest.raises(error, match=words):
        run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    assert not (tmp_path / "out").exists()


def test_tensor_parallel_is_refused_in_one_message(prepared, tmp_path):
    config = config_of("sft", "trainer=TensorParallelTrainer")
    with pytest.raises(ConfigError, match="TensorParallelTrainer"):
        run_train(config, tmp_path / "out", **prepared.paths(sft=True))


def test_samples_while_training_and_processes_are_refused_together(prepared, tmp_path):
    config = config_of("sft", "trainer=FSDPTrainer", "sample_during_eval=true")
    with pytest.raises(ConfigError, match="sample_during_eval"):
        run_train(config, tmp_path / "out", **prepared.paths(sft=True))


def test_samples_while_training(prepared, tmp_path):
    more = ["sample_during_eval=true", "n_eval_model_samples=2"]
    run_train(config_of("sft", *more), tmp_path / "out", **prepared.paths(sft=True))
    lines = (tmp_path / "out/samples.jsonl").read_text(encoding="utf-8").splitlines()
    # before the first and after the last of three steps
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 3, 3]
    assert all(json.loads(line)["prompt"] for line in lines)


def test_wandb_that_is_missing_is_a_clear_error(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of("sft", "wandb.enabled=true")
    with pytest.raises(MissingDependency, match="wandb is not installed"):
        run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    assert not (tmp_path / "out").exists()


def test_debug_asks_for_no_wandb(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of("sft", "wandb.enabled=true", "debug=true")
    run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    assert (tmp_path / "out/model.safetensors").is_file()


def test_one_process_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.delenv("DPO_PROCESSES", raising=False)
    assert processes_here() >= 1
