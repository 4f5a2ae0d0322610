"""What a local run says of a store that does not hold what its steps wrote."""

import json

import pytest
from rich.console import Console

from dpo.errors import StoreUnavailable
from dpo.storage.runs import write_run_manifest
from dpo.storage.store import open_store
from pipelines import history, run
from pipelines.local import Job, LocalRun
from pipelines.package import load_package

PUBLISHED = {"name": "policy", "content_hash": "ab" * 32, "unchanged": False}


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """The outcome of a run whose steps ended well: the gate approved, and publish wrote."""
    store = (tmp_path / "published").as_uri()
    folders = {name: tmp_path / name for name in ("gate", "publish")}
    for folder in folders.values():
        folder.mkdir()
    (folders["gate"] / "verdict.json").write_text('{"approved": true, "rules": []}')
    (folders["publish"] / "published.json").write_text(json.dumps({**PUBLISHED, "url": store}))
    states = dict.fromkeys(folders, "done")
    done = LocalRun("r1", tmp_path / "r1", True, states, {}, folders)
    monkeypatch.setattr(run, "obtain_model", lambda _: None)
    monkeypatch.setattr(run, "planned", lambda *_, **__: {})
    monkeypatch.setattr(history, "with_candidates", lambda plan, _: plan)
    monkeypatch.setattr(run, "run_local", lambda *_, **__: done)
    job = Job(load_package(), {"publish_store": store, "model": "tiny"}, tmp_path / "runs")
    return store, lambda: run.run_here(job, Console())


@pytest.mark.parametrize("left", [None, {"verdict": {"approved": True}}], ids=["nothing", "a part"])
def test_what_was_published_into_the_void_is_no_success(ended, left):
    """It was: state succeeded and exit code 0, while the log said that the run had failed."""
    store, end = ended
    if left:
        write_run_manifest(open_store(store), "r1", **left)
    outcome = end()
    assert (outcome.state, outcome.exit_code) == ("failed", 1)
    assert "what they published is not there" in outcome.message
    assert store in outcome.message


def test_what_is_there_is_a_success(ended):
    store, end = ended
    write_run_manifest(open_store(store), "r1", published=PUBLISHED)
    outcome = end()
    assert (outcome.state, outcome.message) == ("succeeded", "")


def test_a_store_that_is_away_at_the_end_is_told(ended, monkeypatch):
    _, end = ended

    def away(*_):
        raise StoreUnavailable("the store does not answer")

    monkeypatch.setattr(run, "read_run_manifest", away)
    outcome = end()
    assert outcome.state == "succeeded"
    assert "could not be looked into at the end" in outcome.message
