"""Ctrl-C, and SIGTERM as CI sends it, at any time of ``submit.py``."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import cluster, on_cluster, run, sending, submit
from tests.support.kfp_backend import Scenario
from tests.support.submitted import IMAGES

ROOT = Path(submit.__file__).resolve().parent.parent


def heed_signals():
    """A test run in the background ignores SIGINT, under nohup SIGHUP: so would its processes."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("how", "output"),
    [
        (signal.SIGTERM, ["--output", "json"]),
        (signal.SIGINT, ["--output=json"]),
        (signal.SIGHUP, ["--out=json"]),
    ],
    ids=["sigterm", "ctrl-c", "sighup"],
)
def test_while_packages_are_imported(tmp_path, how, output):
    """Imports take a second; here the first of others' takes a minute."""
    slow = tmp_path / "rich" / "__init__.py"
    slow.parent.mkdir()
    slow.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines/submit.py"), "--local", *output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=heed_signals,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "\nNothing was started.\n")
    told = {"state": "interrupted", "message": "Nothing was started.", "run_id": ""}
    assert json.loads(out) == {**told, "exit_code": 130}


@pytest.mark.parametrize(
    ("cancels", "how"),
    [(True, signal.SIGTERM), (False, signal.SIGINT), (False, signal.SIGHUP)],
    ids=["sigterm", "ctrl-c", "sighup"],
)
def test_ctrl_c_and_the_signal_that_ends_a_job_of_ci(backend, store, tmp_path, cancels, how):
    """In a process of its own, because a signal is what Ctrl-C is."""
    backend.scenario = Scenario(states=["RUNNING"])
    more = ["--cancel-on-interrupt"] if cancels else []
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "pipelines/submit.py"), *IMAGES, "--store", store),
            *("--wait", "--output", "json", *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=heed_signals,
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not any(
        run["state"] == "RUNNING" for run in backend.runs.values()
    ):
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(how)
    out, err = process.communicate(timeout=240)
    (run,) = backend.runs.values()
    assert "Traceback" not in err
    if cancels:
        assert process.returncode == 4
        assert json.loads(out)["state"] == "cancelled"
        assert "CANCELING" in [entry["state"] for entry in run["state_history"]]
    else:
        assert process.returncode == 130
        assert "the run goes on" in err
        told = json.loads(out)
        assert (told["state"], told["exit_code"]) == ("interrupted", 130)
        assert told["run_id"] in backend.runs
        assert run["state"] == "RUNNING"


def test_ctrl_c_before_the_run_is_known_says_where_to_look(backend, store, capsys, monkeypatch):
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sending, "submit_once", interrupted)
    assert submit.main([*IMAGES, "--store", store, "--run-name", "mine"]) == 130
    said = capsys.readouterr().err
    assert f"'mine' was being sent: look for it at {backend.url}/#/runs before" in said


def test_ctrl_c_twice_says_that_the_end_is_not_known(backend, store, capsys, monkeypatch):
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_cluster, "wait", interrupted)
    monkeypatch.setattr(cluster, "cancel", interrupted)
    asked = [*IMAGES, "--store", store, "--wait", "--cancel-on-interrupt"]
    assert submit.main(asked) == 130
    (run_id,) = backend.runs
    assert f"`submit.py --cancel {run_id}` asks again" in capsys.readouterr().err


def test_a_local_run_that_is_stopped_says_which_it_was(tmp_path, capsys, monkeypatch):
    """Its JSON had an empty id."""

    def stopped(job, *_, at_end, **__):
        folder = job.runs / "history" / "20260101-000000-000001"
        at_end(folder, {"sft": "running"})
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)
    monkeypatch.setattr(run, "run_local", stopped)
    monkeypatch.setattr(run.history, "remember", lambda *_: None)
    here = ["--local", "--set", "model=tiny", "--runs-dir", str(tmp_path), "--output", "json"]
    assert submit.main(here) == 130
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert (told["state"], told["run_id"]) == ("interrupted", "20260101-000000-000001")
    assert "Run 20260101-000000-000001 was stopped. Finished steps are kept" in said.err
