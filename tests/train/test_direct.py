"""``dpo train`` again: into an output that is complete, and with other settings than its run's."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo.cli import main
from dpo.config.compose import compose
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.data.loader import LoaderState, Order
from dpo.errors import ArtifactError, ConfigError, TrainingError, TrainingStopped
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.manifest import read_manifest
from dpo.train import direct, stage
from dpo.train.direct import train_directly
from dpo.train.position import Position
from dpo.train.stage import run_train
from dpo.train.trainer import Trainer
from tests.train.conftest import SETTINGS

RUN = [*SETTINGS, "loss=sft", "n_examples=16", "checkpoint_every=8", "checkpoint_seconds=0"]


def train(prepared, folder, *more):
    config = compose([*RUN, *more]).config
    return train_directly(config, data=prepared.data, output=folder / "model")


def stop_after(monkeypatch, steps):
    """SIGTERM comes when a run has done so many steps."""
    train_step = Trainer.train_step

    def stopping(self, *arguments, **named):
        found = train_step(self, *arguments, **named)
        self._asked_to_stop = self.position.steps == steps
        return found

    monkeypatch.setattr(Trainer, "train_step", stopping)


def stopped_after(monkeypatch, steps, run):
    """A run that SIGTERM ended; the next one is not."""
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        with pytest.raises(TrainingStopped):
            run()


def test_a_command_that_is_asked_to_end_before_its_first_step_says_how_to_go_on(
    tmp_path, monkeypatch, capsys
):
    def loads(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(direct, "run_ingest", loads)
    before = signal.getsignal(signal.SIGTERM)
    words = ["train", "model=tiny", "loss=sft", "datasets=[hh_sample]", f"local_run_dir={tmp_path}"]
    assert main(words) == TrainingStopped.exit_code == 75
    assert "it was asked to stop outside of its steps" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_complete_output_is_replaced_and_no_checkpoints_are_left(prepared, tmp_path, capsys):
    train(prepared, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    before = read_manifest(tmp_path / "model")
    assert "is complete" not in capsys.readouterr().err
    train(prepared, tmp_path, "lr=1e-4")
    assert f"{tmp_path / 'model'} is complete: it is replaced" in capsys.readouterr().err
    now = read_manifest(tmp_path / "model")
    assert (before.settings["lr"], now.settings["lr"]) == (1e-3, 1e-4)
    assert before.content_hash != now.content_hash


def test_figures_from_before_the_training_are_not_recorded_as_the_model_s(prepared, tmp_path):
    """Without a last evaluation the record had those of the first one."""
    train(prepared, tmp_path, "do_last_eval=false")
    line, *_ = (tmp_path / "model/metrics.jsonl").read_text().splitlines()
    assert "loss/eval" in json.loads(line)
    metrics = read_manifest(tmp_path / "model").details["metrics"]
    assert "loss/train" in metrics
    assert not [name for name in metrics if "eval" in name]
    train(prepared, tmp_path)
    line = (tmp_path / "model/metrics.jsonl").read_text().splitlines()[-1]
    metrics = read_manifest(tmp_path / "model").details["metrics"]
    assert metrics["loss/eval"] == json.loads(line)["loss/eval"]


def test_sft_of_no_pass_hands_the_model_on_as_it_is(prepared, tmp_path, capsys):
    train(prepared, tmp_path, "n_epochs=0")
    manifest = read_manifest(tmp_path / "model")
    assert "nothing is trained, the model goes on as it is" in capsys.readouterr().err
    assert (manifest.details["steps"], manifest.details["examples"]) == (0, 0)
    kept = load_file(tmp_path / "model" / "model.safetensors")
    base = load_file(builtin("builtin:tiny") / "model.safetensors")
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], base[name]) for name in base)


def test_checkpoints_of_a_run_that_was_ended_are_not_taken_for_another(
    prepared, tmp_path, monkeypatch
):
    stopped_after(monkeypatch, 1, lambda: train(prepared, tmp_path))
    assert (tmp_path / "checkpoints/model/step-1").is_dir()
    with pytest.raises(ConfigError, match="those of another run") as caught:
        train(prepared, tmp_path, "lr=1e-4")
    assert "another output" in caught.value.fix
    assert "resume=never" in caught.value.fix
    train(prepared, tmp_path, "lr=1e-4", "resume=never")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_checkpoints_of_other_code_are_not_gone_on_from(prepared, tmp_path, monkeypatch):
    """The one command did not look at the code: after an update it went on with two kinds of it."""
    stopped_after(monkeypatch, 1, lambda: train(prepared, tmp_path))
    made = json.loads((tmp_path / "checkpoints/model/identity.json").read_text())["code"]
    assert made == code_fingerprint("sft")
    monkeypatch.setattr(direct, "code_fingerprint", lambda stage: f"newer code of {stage}")
    with pytest.raises(ConfigError, match=f"code: '{made}' → 'newer code of sft'"):
        train(prepared, tmp_path)
    train(prepared, tmp_path, "resume=force")
    assert read_manifest(tmp_path / "model").code == "newer code of sft"


def test_other_code_is_seen_before_a_reference_is_scored(prepared, tmp_path, monkeypatch):
    config = compose([*SETTINGS, "n_examples=8", "checkpoint_every=8"]).config
    given = {"data": prepared.data, "base": prepared.sft, "output": tmp_path / "model"}
    stopped_after(monkeypatch, 1, lambda: train_directly(config, **given))
    monkeypatch.setattr(direct, "code_fingerprint", lambda stage: "newer")
    monkeypatch.setattr(direct, "run_reference", lambda *_, **__: 1 / 0)
    (tmp_path / "reference/manifest.json").unlink()
    with pytest.raises(ConfigError, match="code: "):
        train_directly(config, **given)


def test_a_run_without_a_place_for_checkpoints_does_not_say_that_it_goes_on(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.delenv("DPO_CHECKPOINTS", raising=False)
    stop_after(monkeypatch, 1)
    config = restrict(compose(RUN).config, "sft")
    with pytest.raises(TrainingStopped, match="nothing was kept") as caught:
        run_train(config, tmp_path / "model", pairs=prepared.data)
    assert "begins anew" in caught.value.fix


def test_checkpoints_of_an_environment_go_to_its_place(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CHECKPOINTS", str(tmp_path / "place"))
    stop_after(monkeypatch, 1)
    with pytest.raises(TrainingStopped):
        train(prepared, tmp_path / "out")
    (kept,) = (tmp_path / "place").iterdir()
    assert (kept / "step-1").is_dir()
    assert not (tmp_path / "out/checkpoints").exists()
    # what stops a run stands at its first step: the second run goes on behind it
    train(prepared, tmp_path / "out")
    assert not list((tmp_path / "place").iterdir())
    lines = (tmp_path / "out/model/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["counters/updates"] for line in lines] == [0, 1, 2, 2]


def test_the_reference_is_scored_where_none_is_given(prepared, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(direct, "run_train", lambda *_, checkpoints, **paths: kept.append(paths))
    config = compose([*SETTINGS, "n_examples=8"]).config
    train_directly(config, data=prepared.data, base=prepared.sft, output=tmp_path / "model")
    assert kept[0]["reference"] == tmp_path / "reference"
    assert read_manifest(tmp_path / "reference", stage="reference").details["pairs"] == 13


def test_a_run_goes_on_with_the_log_probabilities_that_it_began_with(
    prepared, tmp_path, monkeypatch, capsys
):
    """They were made anew. Of another number of processes they are other bits, so the same command
    was told that the checkpoints are those of another run."""
    words = [*SETTINGS, "n_examples=24", "n_eval_examples=4"]

    def train(*more):
        config = compose([*words, *more]).config
        given = {"data": prepared.data, "base": prepared.sft}
        return train_directly(config, output=tmp_path / "model", **given)

    stopped_after(monkeypatch, 2, lambda: train())
    made = tmp_path / "reference/manifest.json"
    at = made.stat().st_mtime_ns
    train("process_timeout_seconds=99")
    assert "goes on after step 2" in capsys.readouterr().err
    assert made.stat().st_mtime_ns == at
    # complete: the next one is a new run
    train()
    assert made.stat().st_mtime_ns > at


def test_log_probabilities_of_other_settings_are_made_anew(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(direct, "run_train", lambda *_, **__: None)
    made = tmp_path / "reference/manifest.json"

    def train(*more):
        config = compose([*SETTINGS, "n_examples=8", *more]).config
        train_directly(config, data=prepared.data, base=prepared.sft, output=tmp_path / "model")
        return made.stat().st_mtime_ns

    times = [train(), train(), train("n_eval_examples=4"), train("n_eval_examples=4")]
    assert times[0] == times[1] < times[2] == times[3] < train("resume=never", "n_eval_examples=4")


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (Position(processes=2, threads=3), "written by 2 processes, now 1"),
        (Position(threads=3), "written with 3 threads, now 2"),
        (Position(threads=2), ""),
        (Position(threads=2, tokens=16384), "written with 16,384 tokens at once, now 2,048"),
        (
            Position(threads=2, compute_dtype="bfloat16"),
            "written with products in bfloat16, now in float32",
        ),
        (Position(threads=2, compute_dtype="float32"), ""),
        # an earlier version did not say
        (Position(), ""),
    ],
)
def test_what_makes_a_run_go_on_within_rounding_only_is_said(position, words, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = position.other_rounding(1, 2048, "float32")
    assert words in said
    assert bool(said) is bool(words)


@pytest.mark.parametrize(("words", "tokens"), [([], 96), (["micro_batch_tokens=64"], 64)])
def test_what_goes_on_keeps_the_rows_that_were_chosen_for_it(
    prepared, tmp_path, monkeypatch, words, tokens
):
    """A GPU with other memory would sum up other rows, were they not set."""
    with monkeypatch.context() as patched:
        patched.setattr(stage, "token_budget", lambda config, *_: config.micro_batch_tokens or 96)
        stop_after(patched, 1)
        with pytest.raises(TrainingStopped):
            train(prepared, tmp_path, *words)
    used, step = [], Trainer.train_step

    def noted(self, *args):
        used.append(self.objective.token_budget)
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", noted)
    train(prepared, tmp_path, *words)
    assert set(used) == {tokens}


def test_what_goes_on_with_less_memory_takes_fewer_tokens(prepared, tmp_path, monkeypatch, capfd):
    """Its checkpoints would be lost: what was chosen does not fit, and set otherwise it is another
    run."""
    with monkeypatch.context() as patched:
        patched.setattr(stage, "token_budget", lambda *_: 96)
        stop_after(patched, 1)
        with pytest.raises(TrainingStopped):
            train(prepared, tmp_path)
    monkeypatch.setattr(stage, "token_budget", lambda *_: 80)
    train(prepared, tmp_path)
    assert "written with 96 tokens at once, now 80: equal within rounding" in capfd.readouterr().err
    assert json.loads((tmp_path / "model/run.json").read_text())["micro_batch_tokens"] == 80


def test_a_full_gpu_is_one_message(prepared, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(TrainingError, match=r"full: CUDA out of memory\. Tried .* 2\.00 GiB\n"):
        train(prepared, tmp_path)
    assert not (tmp_path / "model").exists()


def dpo(prepared, folder, *more):
    config = compose([*RUN, "loss=dpo", "n_examples=24", "n_eval_examples=4", *more]).config
    return train_directly(config, data=prepared.data, base=prepared.sft, output=folder / "model")


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (["trainer=FSDPTrainer", "batch_size=5"], "such as batch_size=6"),
        (["trainer=TensorParallelTrainer", "trainer.tensor_parallel=3"], "one of 1, 2"),
        (["trainer=FSDPTrainer", "trainer.replicas=3"], "one of 1, 2"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_anything_is_made(
    wrong, fix, prepared, tmp_path, monkeypatch
):
    """The reference was scored first, for hours with a model of some size."""
    monkeypatch.setenv("DPO_PROCESSES", "2")
    monkeypatch.setattr(direct, "run_reference", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(ConfigError) as caught:
        dpo(prepared, tmp_path / "run", *wrong)
    assert fix in caught.value.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", ["n_examples=16", "n_eval_examples=3", "max_length=64"])
def test_what_is_refused_leaves_the_log_probabilities_of_the_run_that_was_ended(
    changed, prepared, tmp_path, monkeypatch
):
    """They were scored anew for the command that was then refused. Scored again by another number
    of processes for the first one they are other bits, and it was refused as well."""
    stopped_after(monkeypatch, 2, lambda: dpo(prepared, tmp_path))
    before = read_manifest(tmp_path / "reference")
    monkeypatch.setattr(direct, "run_reference", lambda *_, **__: pytest.fail("scored anew"))
    with pytest.raises(ConfigError, match="those of another run") as caught:
        dpo(prepared, tmp_path, changed)
    assert changed.partition("=")[0] in caught.value.found
    assert "input" not in caught.value.found
    assert read_manifest(tmp_path / "reference").content_hash == before.content_hash
    dpo(prepared, tmp_path)
    assert read_manifest(tmp_path / "model").details["steps"] == 3


def test_where_there_are_no_checkpoints_the_base_model_is_not_read_once_more(tmp_path):
    """Neither folder is there to be read: each start of a training took a hash of both."""
    nowhere = tmp_path / "nowhere"
    config = restrict(compose([*RUN, "loss=dpo"]).config, "preference")
    stage.check_checkpoints(config, tmp_path / "checkpoints", pairs=nowhere, base=nowhere, code="")


def test_a_run_that_is_forced_to_end_before_its_checkpoint_is_refused(
    prepared, tmp_path, monkeypatch
):
    """It trained nothing, recorded 8 of 4 examples, and removed the checkpoints."""
    stopped_after(monkeypatch, 1, lambda: train(prepared, tmp_path))
    with pytest.raises(ConfigError, match="trained on 8 examples, and this run ends after 4"):
        train(prepared, tmp_path, "n_examples=4", "resume=force")
    assert (tmp_path / "checkpoints/model/step-1").is_dir()
    assert not (tmp_path / "model").exists()
    train(prepared, tmp_path, "n_examples=12", "resume=force")
    assert read_manifest(tmp_path / "model").details["steps"] == 2


def test_a_checkpoint_that_stands_behind_the_end_of_the_data_is_refused():
    """An epoch of 5 pairs has no 8th: the step after it was one of no examples."""
    position = Position(steps=2, trained=8, loader=LoaderState(0, 8, 8))
    order = Order(n_pairs=5, batch_size=4, n_epochs=3, n_examples=None, seed=0)
    with pytest.raises(ConfigError, match="8 of them in an epoch that has 5 here") as caught:
        position.check_within(order, Path("kept/step-2"))
    assert "the data that it began with" in caught.value.fix
    position.check_within(replace(order, n_pairs=9), Path("kept/step-2"))
    # the end of an epoch is the beginning of the next
    ended = Position(steps=4, trained=15, loader=LoaderState(3, 0, 15))
    ended.check_within(order, Path("kept/step-4"))


def test_a_setting_of_another_trainer_is_told(prepared, tmp_path, capfd):
    """It trained in float32 without a word."""
    words = ("model.fsdp_policy_mp=float16", "model.compute_dtype=float32", "n_examples=8")
    train(prepared, tmp_path, *words)
    assert "is of FSDPTrainer, and says nothing here: products are in float32" in (
        capfd.readouterr().err
    )


def test_a_folder_of_the_users_own_is_not_the_place_to_prepare_in(tmp_path, capsys):
    """``dpo train datasets=[data/pairs.jsonl] output=policy`` removed ``data`` and what it read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text("mine")
    place = direct._place(tmp_path / "data", tmp_path / "policy", lambda _: True)
    assert place == tmp_path / "policy-data"
    assert "data stays, for no step wrote it" in capsys.readouterr().err
    assert direct._place(tmp_path / "reference", tmp_path / "policy", lambda _: True) == (
        tmp_path / "reference"
    )


def test_an_output_that_is_none_is_refused_before_anything_is_prepared(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not written by a step"):
        train_directly(compose(RUN).config, output=tmp_path / "policy")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["policy", "thesis.txt"]


def test_another_programs_model_among_the_checkpoints_is_not_removed(tmp_path):
    """Seen: ``output=policy`` removed ``checkpoints/policy`` at the end, whatever lay in it."""
    (tmp_path / "checkpoints" / "policy").mkdir(parents=True)
    (tmp_path / "checkpoints" / "policy" / "model.safetensors").write_text("mine")
    with pytest.raises(ArtifactError, match="no checkpoints of a training") as found:
        train_directly(compose(RUN).config, output=tmp_path / "policy")
    assert found.value.where == str(tmp_path / "checkpoints" / "policy")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
