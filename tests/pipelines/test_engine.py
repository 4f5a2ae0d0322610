"""What ends the steps of a local run: its signals, and an engine that goes away meanwhile."""

from types import SimpleNamespace

import pytest
from docker.errors import APIError

from dpo.errors import RequestError
from pipelines import containers
from pipelines.local_worker import _Steps


def test_it_changes_nothing_of_how_the_run_is_said_to_have_ended(monkeypatch, capsys):
    def gone():
        raise RequestError("no container engine answers")

    monkeypatch.setattr(containers, "connect", gone)
    containers.stop_containers("20260101-000000-000000")
    assert "containers of this run may go on" in capsys.readouterr().err


def test_the_containers_are_told_to_end_though_one_has_ended_meanwhile(monkeypatch):
    told = []

    def ended(_):
        raise APIError("container is not running")

    found = [SimpleNamespace(kill=ended), SimpleNamespace(kill=told.append)]
    engine = SimpleNamespace(list=lambda **_: found)
    client = SimpleNamespace(containers=engine, close=lambda: None)
    monkeypatch.setattr(containers, "connect", lambda: client)
    containers.stop_containers("20260101-000000-000000", "SIGTERM")
    assert told == ["SIGTERM"]


def test_training_in_containers_keeps_its_checkpoints_in_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DPO_CHECKPOINTS", raising=False)
    runs = tmp_path / "runs"
    values = {"publish_store": "s3://models"}
    found = containers.container_settings("run", runs, runs / "events", values)
    assert found["environment"]["DPO_CHECKPOINTS"] == str(runs / "checkpoints")


def test_a_run_told_to_end_finishes_its_step_and_begins_no_other():
    steps = _Steps()
    assert [steps.watched(lambda code=code: code)() for code in (0, 7)] == [0, 7]

    def step():
        steps.tell()
        return 0

    # not 0: kfp begins nothing after a step that failed
    assert steps.watched(step)() == 1
    with pytest.raises(SystemExit):
        # no step, which would have had the signal, too
        steps.tell()
