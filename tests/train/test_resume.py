"""A training that was killed goes on to the same weights, metric log and samples."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import ArtifactError, ConfigError, StoreUnavailable
from dpo.storage.store import open_store
from dpo.train.checkpoint import Checkpoints
from dpo.train.period import Period
from dpo.train.place import Place
from dpo.train.position import Position
from dpo.train.stage import run_train
from tests.train.conftest import SETTINGS

RUN = [
    *(*SETTINGS, "n_examples=96", "checkpoint_every=16", "checkpoint_seconds=0", "eval_every=40"),
    *("sample_during_eval=true", "n_eval_model_samples=1"),
]
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
    """Lines of the log of the run that is going on in ``out``, or that ended last."""
    logs = Path(out).glob(".model.*.partial/metrics.jsonl")
    newest = max(logs, key=lambda path: path.stat().st_mtime_ns, default=None)
    return len(newest.read_bytes().splitlines()) if newest else 0


def kill_after(process, out, lines, how=signal.SIGKILL):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if lines_written(out) >= lines:
            process.send_signal(how)
            break
        time.sleep(0.005)
    return process.communicate(timeout=120)


@pytest.fixture(scope="module", params=[pytest.param("sft", marks=pytest.mark.long), "dpo"])
def whole(request, prepared, tmp_path_factory):
    """The run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "model"
    run_train(config_of(request.param), out, **prepared.paths(sft=request.param == "sft"))
    return request.param, out


def assert_same(out, whole):
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert log_of(out) == log_of(whole)
    samples = [(folder / "samples.jsonl").read_text(encoding="utf-8") for folder in (out, whole)]
    assert samples[0] == samples[1]
    assert len(samples[0].splitlines()) > 2


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


TWO = {"DPO_PROCESSES": "2", "OMP_NUM_THREADS": "1"}
FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"


def kill_while_writing(process, out):
    """SIGKILL in the middle of writing a checkpoint, once there is a complete one before it."""
    kept = out / "checkpoints/model"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (kept / "LATEST").exists() and list(kept.glob(".step-*.partial/*")):
            process.kill()
            break
        time.sleep(0.001)
    return process.communicate(timeout=300)


def children_of(process):
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(word) for word in text.split()]


def workers_of(process, n=2):
    """The processes of the training, in the order of their ranks, once it has begun."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        found = [p for p in children_of(process) if b"dpo.distributed.worker" in command_of(p)]
        if len(found) == n:
            return found
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def assert_gone(pids):
    deadline = time.monotonic() + 20
    while any(b"dpo.distributed.worker" in command_of(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)


def whole_of_two(prepared, tmp_path, loss, trainer, monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    paths = prepared.paths(sft=loss == "sft")
    run_train(config_of(loss, trainer), tmp_path / "whole", **paths)
    return tmp_path / "whole"


def test_two_processes_killed_while_they_write_end_the_same(prepared, tmp_path, monkeypatch):
    expected = whole_of_two(prepared, tmp_path, "dpo", FSDP, monkeypatch)
    process = start(prepared, "dpo", tmp_path, FSDP)
    workers = workers_of(process)
    kill_while_writing(process, tmp_path)
    assert_gone(workers)
    process = start(prepared, "dpo", tmp_path, FSDP)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "goes on after step" in errors
    assert_same(tmp_path / "model", expected)


@pytest.mark.long
@pytest.mark.parametrize(
    ("loss", "trainer"),
    [(loss, FSDP) for loss in ("sft", "dpo", "ipo", "robust", "hinge", "simpo", "orpo")]
    + [("dpo", TENSOR), ("sft", TENSOR)],
)
def test_two_processes_killed_at_random_moments(loss, trainer, prepared, tmp_path, monkeypatch):
    expected = whole_of_two(prepared, tmp_path, loss, trainer, monkeypatch)
    chance = random.Random(f"{loss} {trainer}")
    for number in range(4):
        process = start(prepared, loss, tmp_path, trainer, "checkpoint_every=8")
        workers = workers_of(process)
        if number % 2:
            kill_while_writing(process, tmp_path)
        else:
            kill_after(process, tmp_path, lines_written(tmp_path) + chance.randint(1, 4))
        assert_gone(workers)
        if process.returncode == 0:
            break
    else:
        process = start(prepared, loss, tmp_path, trainer, "checkpoint_every=8")
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert_same(tmp_path / "model", expected)


@pytest.mark.long
def test_going_on_with_another_number_of_processes(prepared, tmp_path, monkeypatch):
    expected = whole_of_two(prepared, tmp_path, "sft", FSDP, monkeypatch)
    process = start(prepared, "sft", tmp_path, FSDP)
    kill_after(process, tmp_path, 6)
    monkeypatch.setenv("DPO_PROCESSES", "4")
    process = start(prepared, "sft", tmp_path, FSDP)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "written by 2 processes, now 4" in errors
    a, b = log_of(expected), log_of(tmp_path / "model")
    assert [line["counters/updates"] for line in a] == [line["counters/updates"] for line in b]
    assert b[-1]["loss/eval"] == pytest.approx(a[-1]["loss/eval"], rel=0.01)


@pytest.mark.long
def test_sigterm_with_two_processes_writes_a_checkpoint(prepared, tmp_path, monkeypatch):
    expected = whole_of_two(prepared, tmp_path, "sft", FSDP, monkeypatch)
    process = start(prepared, "sft", tmp_path, FSDP, "checkpoint_every=0")
    _, errors = kill_after(process, tmp_path, 4, signal.SIGTERM)
    assert process.returncode == 75, errors
    assert "a checkpoint was written" in errors
    assert "Traceback" not in errors
    process = start(prepared, "sft", tmp_path, FSDP, "checkpoint_every=0")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert_same(tmp_path / "model", expected)


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_job_and_is_named(
    how, prepared, tmp_path, monkeypatch
):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    more = ("process_timeout_seconds=15", "n_epochs=50", "n_examples=5000", "eval_every=0")
    process = start(prepared, "sft", tmp_path, FSDP, *more)
    workers = workers_of(process)
    deadline = time.monotonic() + 300
    while lines_written(tmp_path) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    began = time.monotonic()
    os.kill(workers[1], how)
    _, errors = process.communicate(timeout=300)
    # the wait, then thirty seconds until the stopped process is killed
    assert time.monotonic() - began < 100
    assert process.returncode == 1, errors
    last = errors[errors.rindex("rank 0:") :] if how == signal.SIGSTOP else errors
    assert "rank 1" in last
    assert os.uname().nodename in last
    # the heartbeat says "no answer for", or a collective operation "did not answer for"
    assert ("answer for 15 s" if how == signal.SIGSTOP else "SIGKILL") in last
    assert_gone(workers)


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


def test_a_rate_that_falls_ends_at_the_end_of_a_run_forced_to_another_batch(prepared, tmp_path):
    """It fell below 0, and steps went up the loss.

    24 of 32 examples are trained on in 3 steps of 8. In batches of 16 one more step is left, the
    last of 4: a quarter of the rate. The whole run in such batches would have had 2 steps, and the
    fourth a rate of (2 - 3) / 2.
    """
    more = ("n_examples=32", "warmup_steps=0", "lr_schedule=linear", "checkpoint_every=8")
    arguments = {"checkpoints": tmp_path / "kept", **prepared.paths(sft=True)}
    run_train(config_of("sft", *more), tmp_path / "model", **arguments)
    assert (tmp_path / "kept/LATEST").read_text().strip() == "step-3"
    forced = config_of("sft", *more, "batch_size=16", "resume=force")
    run_train(forced, tmp_path / "again", **arguments)
    rates = [line["lr"] for line in log_of(tmp_path / "again") if "lr" in line]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_debug_keeps_no_checkpoints_and_writes_the_model(prepared, tmp_path):
    config = config_of("sft", "debug=true")
    paths = prepared.paths(sft=True)
    run_train(config, tmp_path / "model", checkpoints=tmp_path / "kept", **paths)
    assert not list(tmp_path.glob("kept/step-*"))
    assert (tmp_path / "model/model.safetensors").is_file()


def again(prepared, tmp_path, *more):
    """The same run once more, with what it says."""
    config = config_of("sft", *more)
    kept = tmp_path / "kept"
    return run_train(config, tmp_path / "again", checkpoints=kept, **prepared.paths(sft=True))


def test_a_damaged_tensor_file_is_found_and_the_one_before_is_taken(prepared, tmp_path, capsys):
    kept = stopped_run(prepared, tmp_path)
    (tensors,) = kept.glob("step-10/tensors/*.distcp")
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    again(prepared, tmp_path)
    said = capsys.readouterr().err
    assert "step-10 is not used" in said
    assert "goes on after step 8" in said
    assert_same(tmp_path / "again", tmp_path / "model")


def test_checkpoints_of_an_older_format_are_refused(prepared, tmp_path):
    kept = stopped_run(prepared, tmp_path)
    identity = json.loads((kept / "identity.json").read_text())
    del identity["format of checkpoints"]
    (kept / "identity.json").write_text(json.dumps(identity))
    with pytest.raises(ArtifactError, match=r"format 1; this version reads 2"):
        again(prepared, tmp_path)
    assert (kept / "step-10").is_dir(), "nothing is lost"


def test_a_full_disk_leaves_the_checkpoint_out_and_the_training_goes_on(
    prepared, tmp_path, monkeypatch, capsys
):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(f"cannot mount a small disk: run as root: {' '.join(mount)}")
    try:
        paths = prepared.paths(sft=True)
        run_train(config_of("sft"), tmp_path / "model", checkpoints=small / "kept", **paths)
        assert not list(small.glob("kept/.step-*")), "what was begun is removed"
    finally:
        subprocess.run(["umount", str(small)], check=True)
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "training goes on" in said
    assert "Traceback" not in said
    run_train(config_of("sft"), tmp_path / "expected", **paths)
    assert_same(tmp_path / "model", tmp_path / "expected")


def test_the_period_follows_the_measured_cost():
    period = Period()
    assert period.seconds(120) == 120
    assert period.seconds("auto") == 10
    period.stopped_seconds = 2.0
    assert period.seconds("auto") == 200, "1 % of the time"
    period.stopped_seconds = 0.001
    assert period.seconds("auto") == 10
    period.writing_seconds = 30.0
    assert period.seconds("auto") == 150, "20 % of the time"
    period.stopped_seconds = 1000.0
    assert period.seconds("auto") == 3600


def test_a_checkpoint_that_failed_is_not_tried_again_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    keeper = Checkpoints(Place(tmp_path / "file" / "kept"), {}, keep=1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    keeper.save(model, optimizer, Position(), {})
    keeper.finish(strict=False)
    assert keeper.period.seconds("auto") == 300
    assert "training goes on" in capsys.readouterr().err


def test_the_share_of_useful_time_is_reported(prepared, tmp_path, capsys):
    run_train(config_of("sft"), tmp_path / "model", **prepared.paths(sft=True))
    share = json.loads((tmp_path / "model/run.json").read_text())["useful_time_share"]
    assert 0 < share <= 1
    assert "of the time went into optimiser steps" in capsys.readouterr().err


def test_a_store_that_is_away_at_the_end_does_not_fail_a_complete_training(
    prepared, tmp_path, monkeypatch, capsys
):
    """Its checkpoints are to be removed then; the step failed, and with its pod the model went."""

    def away(_):
        raise StoreUnavailable("the store does not answer", where="127.0.0.1:9000")

    monkeypatch.setattr(Checkpoints, "discard", away)
    config = config_of("sft", "n_examples=16", f"checkpoint_uri={tmp_path / 'kept'}")
    run_train(config, tmp_path / "model", **prepared.paths(sft=True))
    said = capsys.readouterr().err
    assert "its checkpoints could not be removed: the store does not answer" in said
    assert (tmp_path / "model/manifest.json").is_file()


@pytest.mark.minio
def test_checkpoints_in_a_store_are_found_from_another_folder(
    whole, prepared, tmp_path, bucket_url
):
    loss, expected = whole
    store = open_store(f"{bucket_url}/checkpoints")
    store.check(create=True)
    more = (f"checkpoint_uri={store.root}", "keep_checkpoints=1")
    process = start(prepared, loss, tmp_path / "first", *more)
    while process.poll() is None and not list(latest_in(store)):
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=120)
    assert list(latest_in(store)), "a checkpoint was sent before the end"
    process = start(prepared, loss, tmp_path / "second", *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "goes on after step" in errors
    assert_same(tmp_path / "second/model", expected)
    assert list(store.list()) == [], "the run is complete"


def latest_in(store):
    return (key for key in store.list() if key.endswith("/LATEST"))
