"""What is shown of a run while it goes on and at its end, on the stand-in."""

import base64
import gzip
import json

import pytest

from pipelines import submit, watch, workflow
from tests.support.kfp_backend import Scenario
from tests.support.submitted import IMAGES, all_done, verdict
from tests.support.workflow import DAG, node, pod, task, workflow_of

IMPL = "retry-system-container-impl"
"""Of a step with retries, as all have that train."""


def attempts(step, *ends):
    """Rows of a step that is tried again: how each attempt ended (state, message)."""
    path = f"{DAG}.{step}"
    names = [f"{path}.executor({number})" for number in range(len(ends))]
    state = ends[-1][0]
    return [
        *task(step, state)[1:2],
        node(path, state, "retry-system-container-executor", [f"{path}.executor"]),
        node(f"{path}.executor", state, IMPL, names, kind="Retry"),
        *(
            node(name, ended, IMPL, kind="Pod", message=message)
            for name, (ended, message) in zip(names, ends, strict=True)
        ),
    ]


def test_a_step_that_is_tried_again_is_told_once_with_the_reason(backend, store, command):
    """Its own state stays RUNNING from the first attempt to the last."""
    first = [("FAILED", "main: Error (exit code 1)"), ("RUNNING", "")]
    second = [first[0], ("FAILED", "OOMKilled (exit code 137)"), ("RUNNING", "")]
    backend.scenario = Scenario(
        states=["RUNNING"] * 5 + ["SUCCEEDED"],
        tasks=[
            attempts("sft", ("RUNNING", "")),
            attempts("sft", *first),
            attempts("sft", *first),
            attempts("sft", *second),
            attempts("sft", *second[:2], ("SUCCEEDED", "")),
            all_done(),
        ],
        on_end=verdict(store, True),
    )
    code, outcome, said = command("--wait")
    assert (code, outcome["steps"]["sft"]) == (0, "done")
    assert [line for line in said.splitlines() if line.startswith("sft: ")] == [
        "sft: running",
        "sft: attempt 2, for the one before ended: main: Error (exit code 1)",
        "sft: attempt 3, for the one before ended: OOMKilled (exit code 137)",
        "sft: done",
    ]


@pytest.mark.parametrize("status", ["exit status 137", "exit status 143"])
def test_a_process_that_was_killed_comes_with_what_to_do(backend, command, status):
    """The pod ends with 1, for Kubeflow's launcher lives; it alone says how the step's ended."""
    rows = attempts("preference", *[("FAILED", "main: Error (exit code 1)")] * 2)
    backend.scenario = Scenario(states=["FAILED"], tasks=[rows])
    backend.logs[pod("preference.executor(1)", IMPL)] = (
        "preference: going on from step 40\n"
        f"F0610 14:24:34.625952      26 main.go:49] failed to execute component: {status}\n"
        "Error: exit status 1\n"
    )
    _, outcome, _ = command("--wait")
    assert outcome["message"].splitlines()[:2] == [
        "step preference failed main: Error (exit code 1)",
        "  | preference: going on from step 40",
    ]
    assert f"`submit.py --retry {outcome['run_id']}` goes on" in outcome["message"]


def test_a_workflow_that_argo_packed_is_read(backend, command, monkeypatch):
    """Above a MiB its nodes are base64 of gzip of JSON (workflow/packer of Argo)."""
    plain = workflow_of(task("sft", "FAILED", message="OOMKilled (exit code 137)"))
    nodes = gzip.compress(json.dumps(plain["status"].pop("nodes")).encode())
    plain["status"]["compressedNodes"] = base64.b64encode(nodes).decode()
    backend.scenario = Scenario(states=["FAILED"], tasks=[task("sft", "FAILED")])
    monkeypatch.setattr(
        backend,
        "get_first_version",
        lambda run_id: {"pipeline_runtime": {"workflow_manifest": json.dumps(plain)}},
    )
    _, outcome, _ = command("--wait")
    assert outcome["message"].startswith("step sft failed OOMKilled (exit code 137)")


@pytest.mark.parametrize("told", [[], [task("ingest", "RUNNING")]])
def test_what_a_packed_workflow_hides_from_the_api_is_told(
    told, backend, command, monkeypatch, store
):
    """Its list of tasks is read from what Argo has not packed: it stays as it was, or empty."""
    monkeypatch.setattr(workflow, "_AGAIN_SECONDS", 0.0)
    done = task("ingest", "SUCCEEDED")
    stages = [task("ingest", "RUNNING"), done, [*done, *task("sft", "SUCCEEDED")]]
    seen = []

    def first_version(run_id):
        plain = workflow_of(stages[min(len(seen), 2)])
        seen.append(run_id)
        nodes = gzip.compress(json.dumps(plain["status"].pop("nodes")).encode())
        plain["status"]["compressedNodes"] = base64.b64encode(nodes).decode()
        return {"pipeline_runtime": {"workflow_manifest": json.dumps(plain)}}

    monkeypatch.setattr(backend, "get_first_version", first_version)
    states = ["PENDING", *["RUNNING"] * 4, "SUCCEEDED"]
    backend.scenario = Scenario(states=states, tasks=told, on_end=verdict(store, True))
    code, outcome, said = command("--wait")
    assert code == 0
    assert outcome["steps"] == {"ingest": "done", "sft": "done"}
    lines = [line for line in said.splitlines() if line.startswith(("ingest:", "sft:"))]
    assert lines == ["ingest: running", "ingest: done", "sft: done"]


@pytest.mark.parametrize("approved", [True, False])
def test_the_summary_is_shown_to_a_person(backend, store, capsys, monkeypatch, approved):
    monkeypatch.setattr(watch, "_FIRST_POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, approved))
    assert submit.main([*IMAGES, "--store", store, "--wait"]) == (0 if approved else 3)
    said = capsys.readouterr().out
    if approved:
        assert "Published: policy abababababab (7 files, 7.0 MiB)" in said
        assert f"published model    {store}/policy/{'ab' * 32}" in said
    else:
        assert "Gate: refused" in said
        assert "Published" not in said


def test_a_run_that_somebody_ended_is_not_silent(backend, store, capsys, monkeypatch):
    monkeypatch.setattr(watch, "_FIRST_POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)
    backend.scenario = Scenario(states=["RUNNING", "CANCELING", "FAILED"])
    assert submit.main([*IMAGES, "--store", store, "--wait"]) == 4
    assert capsys.readouterr().out.split() == ["cancelled"]
