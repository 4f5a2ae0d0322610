"""With an endpoint of Kubeflow Pipelines in the environment, runs go there."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpo.errors import StoreUnavailable
from dpo.storage.runs import write_run_manifest
from dpo.storage.store import open_store
from pipelines import cluster, sending, watch
from pipelines.service import app, execution
from pipelines.service.database import Database, NewRun
from pipelines.service.settings import Settings
from tests.service.support import TINY, ServiceProcess, body, served
from tests.support.kfp_backend import STEPS, Fault, Scenario, running_backend
from tests.support.waiting import wait_until
from tests.support.workflow import task

DEPLOYMENT = """
images:
  data: registry.example/data@sha256:{0}
  train: registry.example/train@sha256:{0}
""".format("1" * 64)
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def no_endpoint_answers(monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", NOBODY)
    # the client asks several times before it gives up
    monkeypatch.setattr("time.sleep", lambda _: None)


def test_a_run_fails_with_a_reason_when_the_endpoint_does_not_answer(tmp_path, no_endpoint_answers):
    settings = Settings(**TINY, data_dir=tmp_path)
    database = Database(settings)
    new = NewRun("acme", "c", "b", "s3://bucket/data.jsonl", {"rows": 1}, "request")
    run, _ = database.accept(new)
    execution.carry_out(database.begin(run.id), settings, database)
    ended = database.get(run.id, None)
    database.close()
    assert ended.state == "failed"
    assert "endpoint" in ended.message


def test_ready_names_the_endpoint_that_does_not_answer(tmp_path, no_endpoint_answers):
    with served(tmp_path / "data") as client:
        errors = client.get("/ready").json["errors"]
    found = {error["field"]: error["message"] for error in errors}
    assert set(found) == {"pipeline", "worker"}
    assert "does not answer" in found["pipeline"] or "refused" in found["pipeline"]


def test_what_is_not_ready_is_logged_when_it_begins_and_when_it_ends(monkeypatch):
    said, broken = [], [True, True, False, True]
    monkeypatch.setattr(app, "log", lambda event, **values: said.append((event, values["part"])))
    check = app._Checks()

    def probe():
        if broken.pop(0):
            raise StoreUnavailable("the store does not answer")

    found = [check("store", probe) for _ in range(4)]
    assert found == [
        "the store does not answer",
        "the store does not answer",
        "ok",
        "the store does not answer",
    ]
    assert said == [("not ready", "store"), ("ready again", "store"), ("not ready", "store")]


def test_a_worker_for_an_endpoint_needs_no_base_model(tmp_path, backend):
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(DEPLOYMENT)
    service = ServiceProcess(
        tmp_path / "data",
        KF_PIPELINES_ENDPOINT=backend.url,
        DPO_SERVICE_DEPLOYMENT=str(deployment),
        DPO_SERVICE_SETTINGS='{"model": "no-one/no-such-model"}',
        # as in a cluster without a way out
        HF_ENDPOINT=NOBODY,
        DPO_CACHE_DIR=str(tmp_path / "cache"),
    )
    client = service.start()
    try:
        wait_until(lambda: client.get("/ready").status == 200, 60, service.said)
    finally:
        service.end(signal.SIGKILL)


def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path):
    # an empty folder where the tokenizer should be, which needs no hub to be missed
    (tmp_path / "model").mkdir()
    preset = {"settings": {"model": str(tmp_path / "model")}}
    with served(tmp_path / "data", **preset) as client:
        answer = client.post(body())
    assert answer.status == 503
    assert answer.json["detail"].startswith("the base model's tokenizer cannot be had")
    assert str(tmp_path) not in answer.json["detail"]


class Killed(BaseException):
    """The process ended here; no ``except Exception`` sees it."""


@pytest.fixture
def backend(monkeypatch, tmp_path):
    # where the stand-in's runs leave their verdict
    monkeypatch.setenv("DPO_SHARED_FOLDER", str(tmp_path))
    monkeypatch.setattr(watch, "_FIRST_POLL_SECONDS", 0.02, raising=False)
    with running_backend() as running:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", running.url)
        yield running


@pytest.fixture
def accepted(tmp_path, backend):
    """A run that waits for its worker, and how a worker takes it up."""
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(DEPLOYMENT)
    settings = Settings(**TINY, data_dir=tmp_path, deployment=str(deployment))
    database = Database(settings)
    new = NewRun("acme", "c", "b", "s3://bucket/data.jsonl", {"rows": 1}, "request")
    run, _ = database.accept(new)

    def approve(backend_run):
        write_run_manifest(
            open_store(settings.community_store("acme")),
            backend_run,
            verdict={"approved": True, "rules": []},
            published={"name": "policy", "content_hash": "ab" * 32, "url": "s3://bucket/policy/ab"},
        )

    rows = [row for step in STEPS for row in task(step, "SUCCEEDED")]
    backend.scenario = Scenario(tasks=[[], rows[:3], rows], on_end=approve)

    def work():
        execution.carry_out(database.begin(run.id), settings, database)
        return database.get(run.id, None)

    yield database, run, work
    database.close()


def test_a_run_is_followed_to_its_report_and_model(accepted, backend):
    _, run, work = accepted
    ended = work()
    assert ended.state == "succeeded", ended.message
    (submitted,) = backend.runs.values()
    assert submitted["display_name"] == run.id
    assert {step["name"]: step["state"] for step in ended.steps} == dict.fromkeys(STEPS, "done")
    assert ended.model_url == "s3://bucket/policy/ab"
    assert ended.report_key == f"runs/{submitted['run_id']}/report.html"


def test_runs_that_begin_at_once_are_all_sent(accepted, backend, tmp_path):
    """As with ``max_runs=3``, or when a worker takes up what another left."""
    database, _, _ = accepted
    settings = Settings(**TINY, data_dir=tmp_path, deployment=str(tmp_path / "deployment.yaml"))
    runs = [
        database.accept(NewRun("acme", f"c{number}", "b", "s3://bucket/x.jsonl", {}, "r"))[0]
        for number in range(3)
    ]
    with ThreadPoolExecutor(len(runs)) as threads:
        begun = [database.begin(run.id) for run in runs]
        list(threads.map(lambda run: execution.carry_out(run, settings, database), begun))
    ended = [database.get(run.id, None) for run in runs]
    assert {run.state for run in ended} == {"succeeded"}, [run.message for run in ended]
    assert {run["display_name"] for run in backend.runs.values()} == {run.id for run in runs}


def test_a_worker_killed_before_it_noted_the_backends_run_submits_once(
    accepted, backend, monkeypatch, tmp_path
):
    database, run, work = accepted
    update = database.update

    def killed(run_id, **values):
        if "backend_run" in values:
            raise Killed
        update(run_id, **values)

    monkeypatch.setattr(database, "update", killed)
    with pytest.raises(Killed):
        work()
    assert (len(backend.runs), database.get(run.id, None).backend_run) == (1, None)
    monkeypatch.undo()
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", backend.url)
    monkeypatch.setenv("DPO_SHARED_FOLDER", str(tmp_path))
    ended = work()
    assert ended.state == "succeeded", ended.message
    assert list(backend.runs) == [ended.backend_run]


def test_a_service_killed_before_the_backend_answered_submits_once(tmp_path, backend):
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(DEPLOYMENT)
    variables = {"KF_PIPELINES_ENDPOINT": backend.url, "DPO_SERVICE_DEPLOYMENT": str(deployment)}
    service = ServiceProcess(tmp_path / "data", **variables)
    backend.faults = [Fault(r"/runs$", method="POST", after=True, hold_seconds=20.0, cut=True)]
    run_id = service.start().post(body()).json["runId"]
    wait_until(lambda: backend.runs, 120, service.said)
    service.end(signal.SIGKILL)
    (submitted,) = backend.runs
    client = service.start()
    try:
        wait_until(
            # the backend first: the service answers so many requests a minute
            lambda: submitted in _polled(backend) and client.run(run_id)["state"] == "running",
            120,
            service.said,
        )
    finally:
        service.end(signal.SIGKILL)
    assert list(backend.runs) == [submitted]


def _polled(backend):
    """Runs whose state somebody asked for."""
    paths = [path.split("?")[0] for method, path in backend.requests if method == "GET"]
    return {path.rpartition("/")[2] for path in paths if "/runs/" in path}


def test_a_lost_answer_does_not_lose_the_run(accepted, backend):
    _, _, work = accepted
    backend.faults = [Fault(r"/runs$", method="POST", after=True, cut=True)]
    ended = work()
    assert ended.state == "succeeded", ended.message
    assert list(backend.runs) == [ended.backend_run]


def test_an_endpoint_that_is_away_for_long_fails_no_run(accepted, backend, monkeypatch):
    monkeypatch.setattr(watch, "_AWAY_SECONDS", 0.0)
    _, _, work = accepted
    backend.faults = [Fault(r"/runs/[^/]+$", status=503, times=3)]
    ended = work()
    assert ended.state == "succeeded", ended.message


@pytest.mark.parametrize("status", [503, 403])
def test_a_run_that_cannot_be_read_any_more_is_not_said_to_have_failed(
    accepted, backend, monkeypatch, status
):
    """It may go on; the service gives up its place, for the endpoint may be gone for good."""
    monkeypatch.setattr(execution, "_AWAY_SECONDS", 0.0)
    database, run, work = accepted
    backend.faults = [Fault(r"/runs/[^/]+$", status=status, times=999)]
    ended = work()
    assert ended.state == "unknown"
    assert "how the run goes on is not known" in ended.message
    assert database.begin(run.id) is None


def test_a_store_that_dies_with_the_pods_is_refused(accepted, backend, monkeypatch):
    monkeypatch.delenv("DPO_SHARED_FOLDER")
    _, _, work = accepted
    ended = work()
    assert ended.state == "failed"
    assert "is a folder of each pod's own" in ended.message
    assert backend.runs == {}


def test_a_model_that_the_services_pod_has_too_is_no_mistake(
    accepted, backend, monkeypatch, tmp_path_factory
):
    """Here "this machine" is a pod of the cluster, with its image and its volumes."""
    _, _, work = accepted
    asked = Settings.run_parameters
    folder = str(tmp_path_factory.mktemp("models"))
    monkeypatch.setattr(
        Settings, "run_parameters", lambda *given: {**asked(*given), "model": folder}
    )
    ended = work()
    assert ended.state == "succeeded", ended.message


def test_a_refused_submission_is_a_failed_run_and_another_name_is_not_taken_for_it(
    accepted, backend
):
    _, run, work = accepted
    backend.faults = [Fault(r"/runs$", method="POST", status=400, times=9)]
    target = cluster.endpoint()
    assert sending.find_runs(cluster.connect(target), target, f"{run.id}x") == []
    ended = work()
    assert ended.state == "failed"
    assert "refused" in ended.message
    assert backend.runs == {}


def test_what_kubernetes_says_of_a_pod_is_no_state_of_a_step(accepted, monkeypatch):
    _, _, work = accepted
    news = "sft: waiting: 0/3 nodes are available: 3 Insufficient memory.\n  fix:   x: y"
    monkeypatch.setattr("pipelines.events.Watcher.news", lambda _: iter([news]))
    seen = []
    real = Database.update

    def noted(self, run_id, **values):
        seen.extend(step["state"] for step in values.get("steps", []))
        real(self, run_id, **values)

    monkeypatch.setattr(Database, "update", noted)
    ended = work()
    assert ended.state == "succeeded", ended.message
    assert set(seen) <= {"waiting", "running", "done", "cached", "failed", "skipped"}
