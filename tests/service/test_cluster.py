"""With an endpoint of Kubeflow Pipelines in the environment, runs go there."""

import pytest

from pipelines.service import execution
from pipelines.service.database import Database, NewRun
from pipelines.service.settings import Settings
from tests.service.support import TINY, served

NOBODY = "http://127.0.0.1:9"

pytestmark = pytest.mark.slow


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
