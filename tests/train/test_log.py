"""Where metrics go: JSON Lines, TensorBoard, wandb, the terminal; and what is called out."""

import errno
import json
import sys
import threading

import numpy as np
import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.loader import Order
from dpo.data.tokenize import TokenizedExample
from dpo.errors import MissingDependency, TrainingError
from dpo.train import stage
from dpo.train.data import Examples
from dpo.train.log import MetricLog, TensorBoardLog, WandbLog, open_sinks
from dpo.train.position import Position
from dpo.train.stage import run_train
from dpo.train.trainer import Trainer
from tests.train.conftest import SETTINGS

RUN = [*SETTINGS, "n_examples=24", "exp_name=logged"]


def config_of(loss, *more):
    stage = "sft" if loss == "sft" else "preference"
    return restrict(compose([*RUN, f"loss={loss}", *more]).config, stage)


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    log = MetricLog(tmp_path)
    log.write({"a": float("nan"), "b": float("-inf"), "c": 1, "d": 0.5, "e": "text"})
    log.close()
    (line,) = log.path.read_text(encoding="utf-8").splitlines()
    assert line == '{"a": null, "b": null, "c": 1, "d": 0.5, "e": "text"}'


def test_tensorboard_has_every_figure(prepared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of("sft", f"tensorboard={tmp_path / 'events'}", "minimum_log_interval_secs=60")
    run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    events = EventAccumulator(str(tmp_path / "events/logged/sft"))
    events.Reload()
    losses = [line for line in log_of(tmp_path / "out") if "loss/train" in line]
    found = events.Scalars("loss/train")
    assert [point.step for point in found] == [8, 16, 24]
    assert [point.value for point in found] == pytest.approx(
        [line["loss/train"] for line in losses], rel=1e-6
    )
    assert "loss/eval" in events.Tags()["scalars"]
    # the model's folder holds no event file: its content hash would change with the time
    assert not list((tmp_path / "out").rglob("*tfevents*"))


def test_a_full_disk_under_tensorboard_ends_its_figures_and_not_the_training(
    tmp_path, monkeypatch, capsys
):
    """Its thread fails, with a traceback of its own, and every later write of ours."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    before = threading.excepthook
    log = TensorBoardLog(tmp_path, "run", "sft")
    log.write({"counters/examples": 8, "loss/train": 2.0})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(2, 100):
        log.write({"counters/examples": 8 * step, "loss/train": 1.0})
    log.close()
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert f"{tmp_path}/run/sft gets no more figures (the disk is full)" in said
    assert threading.excepthook is before


def test_tensorboard_that_is_missing_is_a_clear_error_only_when_asked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert open_sinks(config_of("sft"), "sft", tmp_path, {}) == []
    with pytest.raises(MissingDependency, match="tensorboard is not installed"):
        open_sinks(config_of("sft", "tensorboard=events"), "sft", tmp_path, {})


def test_wandb_offline(prepared, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of("sft", "wandb.enabled=true", "minimum_log_interval_secs=0")
    run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert list(runs[0].glob("*.wandb"))


def test_wandb_without_a_key_is_one_message(prepared, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")

    def refuses(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuses)
    config = config_of("sft", "wandb.enabled=true")
    with pytest.raises(TrainingError, match="No API key configured") as caught:
        run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    assert "WANDB_MODE=offline" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """Stands in for a wandb run."""

    def __init__(self):
        self.points = []

    def log(self, values):
        self.points.append(values)

    def finish(self):
        pass


def test_the_interval_thins_wandb_and_not_the_file(tmp_path):
    recorder = Recorder()
    sink = WandbLog.__new__(WandbLog)
    sink._run, sink._interval, sink._last, sink._left = recorder, 3600.0, float("-inf"), None
    log = MetricLog(tmp_path)
    log.sinks.append(sink)
    for number in range(5):
        log.write({"loss/train": float(number)})
    log.write({"loss/eval": 9.0})
    for number in (5, 6):
        log.write({"loss/train": float(number)})
    log.close()
    # the point before an evaluation and the last one are not left out: short runs had no others
    trained = [{"loss/train": number} for number in (0.0, 4.0, 6.0)]
    assert recorder.points == [*trained[:2], {"loss/eval": 9.0}, trained[2]]
    assert len(log_of(tmp_path)) == 8


def shown_of_collapse(change, start, capsys):
    """The trainer's last words, for a chosen log-prob that moved by ``change`` from ``start``."""
    trainer = Trainer.__new__(Trainer)
    config = config_of("dpo", "loss.beta=0.5")

    class Objective:
        loss = config.loss

    trainer.stage, trainer.objective = "preference", Objective()

    last = {"rewards_train/chosen": 0.5 * change, "logps_train/chosen": start + change}
    trainer.position = Position(last=last)
    trainer._call_out_collapse()
    return capsys.readouterr().err


def test_collapse_of_the_chosen_responses_is_called_out(capsys):
    """From -50 to -61 is a fall by 22 %; to -59 by 18 %; a rise is none."""
    shown = shown_of_collapse(-11.0, -50.0, capsys)
    assert "fell from -50.0 to -61.0" in shown
    assert "raise beta" in shown
    assert shown_of_collapse(-9.0, -50.0, capsys) == ""
    assert shown_of_collapse(20.0, -50.0, capsys) == ""


def test_the_terminal_shows_what_matters(prepared, tmp_path, capfd):
    run_train(config_of("dpo"), tmp_path / "out", **prepared.paths(sft=False))
    shown = capfd.readouterr().err
    for word in ("loss", "accuracy", "margin", "pairs_per_second"):
        assert word in shown


def test_more_examples_than_there_are_is_said(capfd):
    config = config_of("sft", "n_examples=1000000")
    order = Order(n_pairs=750, batch_size=8, n_epochs=1, n_examples=1_000_000, seed=0)
    stage._say_what_is_missing(config, "sft", Examples(order, {}, [], ""))
    shown = capfd.readouterr().err
    assert "n_examples is 1,000,000" in shown
    assert "750 training pairs gives 750" in shown
    order = Order(n_pairs=750, batch_size=8, n_epochs=1, n_examples=24, seed=0)
    stage._say_what_is_missing(config_of("sft"), "sft", Examples(order, {}, [], ""))
    assert capfd.readouterr().err == ""


def test_what_is_cut_is_said(capfd):
    """Three pairs, one of them drawn twice: two have a shortened prompt, one a response too."""
    none = np.zeros(0, np.int32)
    whole = TokenizedExample("a", none, ())
    prompt = TokenizedExample("b", none, (), prompt_is_cut=True)
    both = TokenizedExample("c", none, (), prompt_is_cut=True, a_response_is_cut=True)
    order = Order(n_pairs=4, batch_size=2, n_epochs=1, n_examples=None, seed=0)
    cut = Examples(order, dict(enumerate((whole, prompt, both, both))), [], "")
    stage._say_what_is_missing(
        config_of("sft", "max_length=40", "max_prompt_length=20"), "sft", cut
    )
    assert (
        "of 3 training pairs, 2 are read with a shortened prompt and 1 with a shortened response "
        "(max_length=40)"
    ) in capfd.readouterr().err
