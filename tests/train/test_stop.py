"""SIGTERM in an evaluation ends it at once; nothing is lost, and nothing logged twice. Ctrl-C."""

import os
import signal

import pytest

from dpo.config.compose import compose
from dpo.errors import StoreUnavailable, TrainingStopped
from dpo.modeling import generation
from dpo.train.checkpoint import Checkpoints
from dpo.train.direct import train_directly
from dpo.train.stage import run_train
from dpo.train.step import Objective
from dpo.train.trainer import Trainer
from tests.train.conftest import SETTINGS
from tests.train.test_resume import (
    FSDP,
    TWO,
    assert_gone,
    assert_same,
    config_of,
    kill_after,
    start,
    workers_of,
)

MANY_ROWS = ("micro_batch_tokens=128", "checkpoint_every=0")


def train(prepared, folder, name, *more):
    paths = prepared.paths(sft=False)
    config = config_of("dpo", *MANY_ROWS, *more)
    run_train(config, folder / name, checkpoints=folder / "kept", **paths)


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The run without interruption: evaluations before, after steps 5 and 10, and at the end."""
    folder = tmp_path_factory.mktemp("whole")
    train(prepared, folder, "model")
    return folder / "model"


def stop_in(monkeypatch, number):
    """SIGTERM comes in evaluation ``number`` of a run; returns the rows that it has done."""
    evaluate, figures = Objective.evaluate, Objective.figures
    counts = {"evaluations": 0, "rows": 0}

    def stopping(self, *arguments):
        counts["evaluations"] += 1
        counts["rows"] = 0
        return evaluate(self, *arguments)

    def counting(self, row, reference, split):
        counts["rows"] += split == "eval"
        if split == "eval" and counts["evaluations"] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return figures(self, row, reference, split)

    monkeypatch.setattr(Objective, "evaluate", stopping)
    monkeypatch.setattr(Objective, "figures", counting)
    return counts


@pytest.mark.parametrize(
    ("number", "where"),
    [
        (1, "before its first step; there was nothing to keep"),
        (2, "after step 5; a checkpoint was written"),
        (4, "after step 12; a checkpoint was written"),
    ],
)
def test_a_run_stopped_in_an_evaluation_makes_it_anew(
    number, where, whole, prepared, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        counts = stop_in(patch, number)
        with pytest.raises(TrainingStopped, match=where):
            train(prepared, tmp_path, "model")
        # each of the processor's cores may have had one in work
        assert counts["rows"] <= 2
        if number > 1:
            # and once more in the same place, by a run that has trained nothing
            counts["evaluations"] = number - 1
            with pytest.raises(TrainingStopped, match=where):
                train(prepared, tmp_path, "model")
    train(prepared, tmp_path, "model")
    assert_same(tmp_path / "model", whole)


def test_a_run_stopped_while_it_samples_makes_the_evaluation_anew(
    whole, prepared, tmp_path, monkeypatch
):
    """All answers were waited for; the metric log and the samples are those of one evaluation."""
    answer_batch = generation._answer_batch
    counts = {"batches": 0, "asked": 0}

    def stopping(state, forward, room, sampler, ends, between, **more):
        counts["batches"] += 1

        def asked():
            counts["asked"] += 1
            if counts["batches"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            between()

        return answer_batch(state, forward, room, sampler, ends, asked, **more)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_answer_batch", stopping)
        with pytest.raises(TrainingStopped, match="after step 5; a checkpoint was written"):
            train(prepared, tmp_path, "model")
    # six times for the 48 tokens of the first, once for the second
    assert counts == {"batches": 2, "asked": 7}
    train(prepared, tmp_path, "model")
    assert_same(tmp_path / "model", whole)


def test_a_run_stopped_while_its_store_is_away_says_what_is_lost(
    prepared, tmp_path, monkeypatch, capsys
):
    """It ended with 1 and the store's error alone, after a line that training goes on."""

    def away(*_):
        raise StoreUnavailable("the store does not answer", where="127.0.0.1:9000")

    monkeypatch.setattr(Checkpoints, "_write", away)
    stop_in(monkeypatch, 2)
    with pytest.raises(TrainingStopped) as stopped:
        train(prepared, tmp_path, "model")
    assert stopped.value.exit_code == 75
    said = str(stopped.value)
    assert "after step 5; no checkpoint of it could be written: the store does not answer" in said
    assert "goes on from the one before, if there is one" in said
    assert "training goes on" not in capsys.readouterr().err


@pytest.mark.long
def test_two_processes_stopped_in_an_evaluation(prepared, tmp_path, monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    more = (FSDP, "micro_batch_tokens=128", "checkpoint_every=0", "n_examples=16", "eval_every=8")
    run_train(config_of("sft", *more), tmp_path / "whole", **prepared.paths(sft=True))
    process = start(prepared, "sft", tmp_path, *more)
    workers = workers_of(process)
    # the first evaluation and a step are logged: it is in the second one
    _, errors = kill_after(process, tmp_path, 2, signal.SIGTERM)
    assert process.returncode == 75, errors
    assert "after step 1; a checkpoint was written" in errors
    assert "Traceback" not in errors
    assert_gone(workers)
    _, errors = start(prepared, "sft", tmp_path, *more).communicate(timeout=300)
    assert "goes on after step 1" in errors
    assert_same(tmp_path / "model", tmp_path / "whole")


def test_a_run_that_ctrl_c_ended_says_how_to_go_on(prepared, tmp_path, monkeypatch, capsys):
    """It said that nothing half-written was kept; the same command began in another folder."""
    words = [*SETTINGS, "loss=sft", "n_examples=16", "checkpoint_every=8", "checkpoint_seconds=0"]
    words.append(f"local_dirs=[{tmp_path}]")
    train_step = Trainer.train_step

    def interrupted(self, *arguments, **named):
        if self.position.steps == len(said):
            raise KeyboardInterrupt
        return train_step(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    said = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_directly(compose(words).config, data=prepared.data)
        said.append(capsys.readouterr().err)
    (folder,) = (path.parents[2] for path in tmp_path.rglob("checkpoints/LATEST/step-1"))
    again = f"local_run_dir={folder}"
    # where there was no checkpoint yet, nothing is promised
    assert [again in text for text in said] == [False, True]
    train_directly(compose([*words, again]).config, data=prepared.data)
    assert "goes on after step 1" in capsys.readouterr().err
