"""A training that was killed goes on to the same weights and the same metric log."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ConfigError
from dpo.train.stage import run_train
from tests.train.conftest import SETTINGS

RUN = [*SETTINGS, "n_examples=96", "checkpoint_every=16", "checkpoint_seconds=0", "eval_every=40"]
TIMES = {"examples_per_second"}


def config_of(loss, *more):
    stage = "sft" if loss == "sft" else "preference"
    return restrict(compose([*RUN, f"loss={loss}", *more]).config, stage)


def log_of(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in lines
    ]


def start(prepared, loss, out, *more, environment=None):
    """``dpo train`` in a process of its own."""
    words = [*RUN, f"loss={loss}", f"data={prepared.data}", f"output={out}/model", *more]
    if loss != "sft":
        words += [f"base={prepared.sft}", f"reference={prepared.reference}"]
    return subprocess.Popen(
        [sys.executable, "-m", "dpo", "train", *words],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_written(out):
    """Lines of the log of the run that is going on in ``out``."""
    for path in Path(out).glob(".model.*.partial/metrics.jsonl"):
        return len(path.read_bytes().splitlines())
    return 0


def kill_after(process, out, lines, how=signal.SIGKILL):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if lines_written(out) >= lines:
            process.send_signal(how)
            break
        time.sleep(0.005)
    return process.communicate(timeout=120)


@pytest.fixture(scope="module", params=["sft", "dpo"])
def whole(request, prepared, tmp_path_factory):
    """The run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "model"
    run_train(config_of(request.param), out, **prepared.paths(sft=request.param == "sft"))
    return request.param, out


def assert_same(out, whole):
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert log_of(out) == log_of(whole)


def test_a_killed_run_ends_with_the_same_weights_and_log(whole, prepared, tmp_path):
    loss, expected = whole
    process = start(prepared, loss, tmp_path)
    _, errors = kill_after(process, tmp_path, 6)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "model").exists()
    process = start(prepared, loss, tmp_path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "goes on after step" in errors
    assert_same(tmp_path / "model", expected)


@pytest.mark.long
@pytest.mark.parametrize("loss", ["sft", "dpo", "ipo", "robust", "hinge", "simpo", "orpo"])
def test_runs_killed_many_times_at_random_moments(loss, prepared, tmp_path):
    expected = tmp_path / "whole"
    run_train(config_of(loss), expected, **prepared.paths(sft=loss == "sft"))
    chance = random.Random(loss)
    for _ in range(6):
        process = start(prepared, loss, tmp_path, "checkpoint_every=8")
        kill_after(process, tmp_path, lines_written(tmp_path) + chance.randint(1, 5))
        if process.returncode == 0:
            break
        time.sleep(chance.random() / 10)
    else:
        process = start(prepared, loss, tmp_path, "checkpoint_every=8")
        process.communicate(timeout=300)
    assert process.returncode == 0
    assert_same(tmp_path / "model", expected)


def test_sigterm_writes_a_checkpoint_and_has_its_own_exit_code(whole, prepared, tmp_path):
    loss, expected = whole
    process = start(prepared, loss, tmp_path, "checkpoint_every=0")
    _, errors = kill_after(process, tmp_path, 4, signal.SIGTERM)
    assert process.returncode == 75, errors
    assert "a checkpoint was written" in errors
    assert "Traceback" not in errors
    process = start(prepared, loss, tmp_path, "checkpoint_every=0")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(tmp_path / "model", expected)


def stopped_run(prepared, folder):
    """A run in this process with checkpoints after steps 2, 4, ..., of which two are kept."""
    run_train(
        config_of("sft"), folder / "model", checkpoints=folder / "kept", **prepared.paths(sft=True)
    )
    return folder / "kept"


def test_the_last_checkpoints_are_kept_and_latest_names_the_newest(prepared, tmp_path):
    kept = stopped_run(prepared, tmp_path)
    assert {path.name for path in kept.glob("step-*")} == {"step-8", "step-10"}
    assert (kept / "LATEST").read_text().strip() == "step-10"


def test_a_damaged_checkpoint_is_passed_over(prepared, tmp_path):
    kept = stopped_run(prepared, tmp_path)
    (kept / "step-10/manifest.json").unlink()
    run_train(config_of("sft"), tmp_path / "again", checkpoints=kept, **prepared.paths(sft=True))
    assert load_file(tmp_path / "again/model.safetensors").keys() == (
        load_file(tmp_path / "model/model.safetensors").keys()
    )
    assert_same(tmp_path / "again", tmp_path / "model")


@pytest.mark.parametrize("resume", ["auto", "force", "never"])
def test_checkpoints_of_other_settings_are_refused_unless_forced(prepared, tmp_path, resume):
    kept = stopped_run(prepared, tmp_path)
    config = config_of("sft", "lr=2e-3", f"resume={resume}")
    arguments = {"checkpoints": kept, **prepared.paths(sft=True)}
    if resume == "auto":
        with pytest.raises(ConfigError, match=r"lr: 0\.001 → 0\.002"):
            run_train(config, tmp_path / "again", **arguments)
        return
    run_train(config, tmp_path / "again", **arguments)
    rates = {line["lr"] for line in log_of(tmp_path / "again") if "lr" in line}
    assert (1e-3 in rates) is (resume == "force")


def test_debug_keeps_no_checkpoints_and_writes_the_model(prepared, tmp_path):
    config = config_of("sft", "debug=true")
    paths = prepared.paths(sft=True)
    run_train(config, tmp_path / "model", checkpoints=tmp_path / "kept", **paths)
    assert not list(tmp_path.glob("kept/step-*"))
    assert (tmp_path / "model/model.safetensors").is_file()
