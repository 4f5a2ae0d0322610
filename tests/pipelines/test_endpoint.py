"""Tests without faults, on the stand-in and, with KF_PIPELINES_ENDPOINT set, on a real endpoint.

A real one (``make test-cluster``) also needs the names of the images there and a store that both it
and this machine reach: DPO_TEST_DATA_IMAGE, DPO_TEST_TRAIN_IMAGE, DPO_TEST_STORE, and
DPO_TEST_DEPLOYMENT where ``standalone`` does not fit. Runs take the tiny model and the real pairs.
"""

import json
import os
from uuid import uuid4

import pytest

from pipelines import cluster, package, submit, watch
from tests.support.checkout import FAST
from tests.support.kfp_backend import Scenario, running_backend
from tests.support.submitted import all_done, verdict

CACHEABLE = {"ingest", "sft", "reference", "preference", "evaluate"}
NEEDED = ("KF_PIPELINES_ENDPOINT", "DPO_TEST_DATA_IMAGE", "DPO_TEST_TRAIN_IMAGE", "DPO_TEST_STORE")
WAIT = ("--wait", "--timeout-seconds", "3600")


class Place:
    """An endpoint, and how runs are started on it."""

    def __init__(self, images, store, deployment, capsys, backend=None):
        self.images, self.store, self.deployment = images, store, deployment
        self.capsys, self.backend = capsys, backend

    def command(self, *arguments):
        """Exit code, the JSON object and what stderr said."""
        code = submit.main(
            [
                *(
                    item
                    for kind, name in self.images.items()
                    for item in ("--image", f"{kind}={name}")
                ),
                *("--deployment", self.deployment, "--store", self.store, "--output", "json"),
                *(item for setting in FAST for item in ("--set", setting)),
                *arguments,
            ]
        )
        printed = self.capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    def approve(self):
        """Let the stand-in's next run end well; a real one needs no telling."""
        if self.backend is None:
            return
        end = verdict(self.store, approved=True)
        self.backend.scenario = Scenario(tasks=[all_done()], on_end=end)

    def client(self):
        target = cluster.endpoint()
        return cluster.connect(target), target


def real_place(capsys):
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        pytest.skip(f"set {', '.join(missing)}")
    images = {kind: os.environ[f"DPO_TEST_{kind.upper()}_IMAGE"] for kind in ("data", "train")}
    deployment = os.environ.get("DPO_TEST_DEPLOYMENT", "standalone")
    return Place(images, os.environ["DPO_TEST_STORE"], deployment, capsys)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.cluster)])
def place(request, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)
    if request.param == "real":
        yield real_place(capsys)
        return
    for name in [name for name in os.environ if name.startswith("KF_PIPELINES")]:
        monkeypatch.delenv(name)
    # kfp keeps a context file in the home folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    # where the stand-in's runs leave their verdict
    monkeypatch.setenv("DPO_SHARED_FOLDER", str(tmp_path))
    monkeypatch.setattr(watch, "_FIRST_POLL_SECONDS", 0.01)
    images = {"data": "registry.test/data:1", "train": "registry.test/train:1"}
    with running_backend() as backend:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", backend.url)
        yield Place(images, (tmp_path / "store").as_uri(), "cpu", capsys, backend)


def test_a_run_ends_well_and_the_link_comes_first(place):
    place.approve()
    code, outcome, said = place.command(*WAIT)
    assert (code, outcome["state"]) == (0, "succeeded"), said
    assert said.splitlines()[0].endswith(f"/#/runs/details/{outcome['run_id']}")
    assert set(outcome["steps"]) == set(package.STEPS)
    assert outcome["published"]["content_hash"]


def test_uploading_twice_registers_once_and_a_run_is_linked_to_its_version(place):
    place.approve()
    code, first, _ = place.command("--upload")
    assert code == 0
    _, again, said = place.command("--upload")
    assert "was registered before" in said
    assert again["where"] == first["where"]
    _, started, _ = place.command("--upload", "--run")
    client, target = place.client()
    run = client.get_run(started["run_id"])
    assert run.pipeline_version_reference.pipeline_version_id in first["where"]
    if place.backend is None:
        cluster.cancel(client, target, started["run_id"])


def test_a_run_is_cancelled_and_that_is_told_from_a_failure(place):
    if place.backend is not None:
        place.backend.scenario = Scenario(states=["RUNNING"])
    _, started, _ = place.command()
    client, target = place.client()
    client.get_run(started["run_id"])
    assert submit.main(["--cancel", started["run_id"]]) == 0
    place.capsys.readouterr()
    outcome = watch.wait(
        client, target, started["run_id"], store=place.store, timeout_seconds=600, say=print
    )
    assert outcome.state == "cancelled"


def test_a_run_that_succeeded_is_not_retried(place):
    place.approve()
    _, outcome, _ = place.command(*WAIT)
    code, _, said = place.command("--retry", outcome["run_id"])
    assert code == 2
    assert "cannot be retried" in said
    assert "Traceback" not in said


def test_a_run_that_is_not_there_is_one_message(place):
    code = submit.main(["--cancel", str(uuid4())])
    said = place.capsys.readouterr().err
    assert code == 2
    assert "cannot be cancelled" in said
    assert "Traceback" not in said


def test_a_schedule_starts_no_run_now(place):
    name = f"nightly-{uuid4().hex[:8]}"
    code, outcome, _ = place.command("--schedule", "0 0 3 1 1 *", "--run-name", name)
    assert code == 0
    schedule = outcome["run_id"]
    if place.backend is None:
        client, _ = place.client()
        client.delete_recurring_run(schedule)


@pytest.mark.cluster
def test_what_changed_runs_again_on_the_cluster_and_nothing_else(monkeypatch, capsys):
    """In one test, because each run is judged by the one before."""
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)
    place = real_place(capsys)
    code, _, said = place.command(*WAIT)
    assert code == 0, said

    def ran(*arguments):
        code, outcome, said = place.command(*WAIT, *arguments)
        assert code == 0, said
        return {step for step in CACHEABLE if outcome["steps"][step] == "done"}

    assert ran() == set()
    assert ran("--deploy", "train.memory=5Gi") == set()
    beta = f"loss.beta=0.{uuid4().int % 10**6:06d}1"
    assert ran("--set", beta) == {"preference", "evaluate"}
    assert ran("--rerun", "sft") == CACHEABLE - {"ingest"}
