"""``dpo publish`` as a single step: what is recorded under its run id is of one policy."""

import pytest

from dpo.cli import main
from dpo.publish.verify import verify
from dpo.storage.manifest import read_manifest, write_manifest
from dpo.storage.runs import read_run_manifest
from tests.publish.pipeline import source


@pytest.fixture
def step(pipeline):
    """Publishes what a run made into the store, as a single step; returns the exit code."""

    def publish(run_id, *settings):
        place = pipeline.folder / run_id
        inputs = [f"{name}={place / name}" for name in ("policy", "evaluation", "verdict")]
        outputs = [f"output={place / 'step'}", f"publish.store={pipeline.root}"]
        return main(["publish", "model=tiny", *inputs, *outputs, *settings])

    for number, run_id in enumerate(("a", "b")):
        elsewhere = f"file://{pipeline.folder}/elsewhere"
        pipeline.run(run_id, source("pairs.jsonl"), weight=number, store=elsewhere)
    return publish


def policy_of(pipeline, run_id):
    return read_manifest(pipeline.folder / run_id / "policy").content_hash


def recorded(pipeline):
    run = read_run_manifest(pipeline.root, "run")
    return run["artifacts"]["evaluate"]["parents"]["policy"]


def test_another_policy_needs_another_run_id(pipeline, step, capsys):
    assert step("a") == 0
    first = verify(f"{pipeline.root}/policy")["content_hash"]
    assert step("b") == 2
    assert "exp_name=NAME" in capsys.readouterr().err
    assert recorded(pipeline) == policy_of(pipeline, "a")
    assert verify(f"{pipeline.root}/policy")["content_hash"] == first
    assert step("b", "exp_name=second") == 0
    assert verify(f"{pipeline.root}/policy")["policy"] == policy_of(pipeline, "b")


def test_the_same_step_may_be_repeated(pipeline, step):
    assert [step("a"), step("a")] == [0, 0]
    assert recorded(pipeline) == policy_of(pipeline, "a")


def test_a_refused_policy_leaves_what_is_recorded(pipeline, step, capsys):
    assert step("a") == 0
    verdict = pipeline.folder / "b/verdict"
    inputs = read_manifest(verdict).inputs
    write_manifest(verdict, "gate", inputs=inputs, details={"approved": False})
    assert step("b") == 1
    assert "the gate refused this policy" in capsys.readouterr().err
    assert recorded(pipeline) == policy_of(pipeline, "a")
