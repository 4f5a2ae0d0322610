"""Runs on Kubeflow that are explained, and that others start from."""

import json

import pytest

from dpo.publish.runs import record_plan
from dpo.storage.runs import write_run_manifest
from dpo.storage.store import open_store
from pipelines import submit
from tests.support.kfp_backend import STEPS, Scenario
from tests.support.submitted import IMAGES, verdict
from tests.support.workflow import DAG, node, task


def plan(**changes):
    """Of a run: settings and fingerprints by step."""
    settings = {"beta": changes.get("beta", 0.1)}
    known = {"code": changes.get("code", "c"), "data": changes.get("data", "d")}
    made = {f"{step}_settings": "{}" for step in ("gate", "publish")}
    for step in ("ingest", "sft", "reference", "preference", "evaluate"):
        made[f"{step}_settings"] = json.dumps({"loss": settings} if step == "preference" else {})
        made[f"{step}_fingerprint"] = json.dumps(known if step == "ingest" else {"code": "c"})
    return made


@pytest.mark.parametrize(
    ("changes", "images", "step", "kind", "text"),
    [
        ({"beta": 0.2}, "1", "preference", "configuration", "loss.beta: 0.1 → 0.2"),
        ({"data": "e"}, "1", "ingest", "data", "data changed"),
        ({"code": "e"}, "1", "ingest", "code", "code changed"),
        ({}, "2", "sft", "image", "train:1 → train:2"),
    ],
)
def test_explain_names_the_input_that_changed(
    backend, store, command, capsys, changes, images, step, kind, text
):
    rows = [r for s in STEPS for r in task(s, "SUCCEEDED")]
    backend.scenario = Scenario(tasks=[rows])
    _, outcome, _ = command()
    run_id = outcome["run_id"]
    backend.get_run(run_id)
    for identity, began, made, tag in (
        ("earlier", "2026-01-01", plan(), "1"),
        ("other-name", "2026-01-03", plan(beta=9), "9"),
        (run_id, "2026-01-04", plan(**changes), images),
    ):
        name = "other" if identity == "other-name" else "policy"
        write_run_manifest(
            open_store(store),
            identity,
            began=began,
            plan=made,
            parameters={"publish_name": name},
            images={"data": "data:1", "train": f"train:{tag}"},
        )
    # the store's address comes from the run's own parameters
    assert submit.main(["explain", run_id, "--output", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["before"] == "earlier"
    assert told["steps"][step]["changed"] == {kind: [text]}
    assert told["steps"][step]["state"] == "done"
    assert told["steps"]["gate"]["reason"] == "never cached"


def loop(*candidates):
    """Nodes of a sweep's loop; of each candidate two states."""
    rows = []
    for place, states in enumerate(candidates):
        group = f"{DAG}.for-loop-1.iteration-iterations({place}:{place})"
        inside = f"{group}.iteration-item"
        first, last = (f"{inside}.{step}" for step in ("preference", "evaluate"))
        both = [
            task(step, state, within=inside)
            for step, state in zip(("preference", "evaluate"), states, strict=True)
        ]
        # what comes next is behind the executor of the step before
        both[0][2]["children"] = node(last, "PENDING", children=[f"{last}-driver"])["children"]
        both[0][1]["children"] = node(last, "PENDING", children=[first])["children"]
        both[1][1]["children"] = node(last, "PENDING", children=[last])["children"]
        rows += [
            node(group, "SUCCEEDED", children=[f"{group}.iteration-item-driver"]),
            node(f"{group}.iteration-item-driver", "SUCCEEDED", children=[inside], kind="Pod"),
            node(inside, "SUCCEEDED", children=[f"{first}-driver"]),
            *(row for rows_of_step in both for row in rows_of_step),
        ]
    return rows


@pytest.mark.parametrize("answers", [True, False])
def test_explain_lists_the_candidates_of_a_sweep(
    backend, store, command, capsys, monkeypatch, answers
):
    rows = loop(("SUCCEEDED", "SUCCEEDED"), ("SKIPPED", "SUCCEEDED"))
    backend.scenario = Scenario(tasks=[rows + task("select", "SUCCEEDED") + task("gate", "FAILED")])
    _, outcome, _ = command("--sweep", "loss.beta=0.3,0.7")
    run_id = outcome["run_id"]
    spec = backend.runs[run_id]["pipeline_spec"]["pipeline_spec"]
    first = spec["deploymentSpec"]["executors"]["exec-fingerprint"]["container"]
    told = {item["name"]: item["value"] for item in first["env"]}["DPO_CANDIDATES"]
    # what the first step writes down
    monkeypatch.setenv("DPO_CANDIDATES", told)
    record_plan({"publish_store": store, "publish_name": "policy"}, run_id, plan())
    backend.get_run(run_id)
    if not answers:
        monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    asked = ["explain", run_id, "--store", store]
    assert submit.main([*asked, "--output", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    cached = {"preference": "cached", "evaluate": "done"} if answers else {}
    assert told["candidates"] == {
        "loss.beta=0.3": dict.fromkeys(cached, "done"),
        "loss.beta=0.7": cached,
    }
    assert "select" in told["steps"]
    assert submit.main(asked) == 0
    said = capsys.readouterr().out.splitlines()
    more = ": preference cached, evaluate executed" if answers else ""
    assert f"candidate loss.beta=0.7{more}" in said


def test_a_run_starts_from_one_in_the_store(backend, store, command):
    sources = {step: f"s3://kfp/{step}" for step in ("ingest", "sft", "reference", "preference")}
    write_run_manifest(
        open_store(store),
        "earlier",
        sources=sources,
        parameters={"preference_beta": 0.7, "publish_store": store, "gone_by_now": 1},
    )
    _, outcome, _ = command("--from", "earlier", "--rerun", "reference")
    sent = backend.runs[outcome["run_id"]]["runtime_config"]["parameters"]
    assert (sent["data_uri"], sent["sft_model_uri"]) == ("s3://kfp/ingest", "s3://kfp/sft")
    assert sent["reference_uri"] == "", "named in --rerun"
    assert sent["preference_beta"] == 0.7
    _, outcome, _ = command("--from", "earlier", "--rerun", "sft", "--set", "preference_beta=0.2")
    sent = backend.runs[outcome["run_id"]]["runtime_config"]["parameters"]
    assert sent["data_uri"] == "s3://kfp/ingest"
    assert sent["sft_model_uri"] == sent["reference_uri"] == "", "what follows runs as well"
    assert sent["preference_beta"] == 0.2


def test_a_run_that_left_no_artifacts_is_no_start(store, command, backend):
    write_run_manifest(open_store(store), "failed", parameters={})
    code, _, said = command("--from", "failed")
    assert code == 2
    assert "left no artifacts to start from" in said
    code, _, said = command("--from", "never")
    assert code == 2
    assert "run never left no manifest in the store" in said
    assert backend.runs == {}


@pytest.mark.parametrize("how", [["--run", "--upload"], []])
@pytest.mark.parametrize("asked", [[*IMAGES, "--from"], ["explain"], [*IMAGES, "--retry"]])
def test_a_run_of_another_pipeline_is_told_as_one(backend, command, capsys, tmp_path, how, asked):
    _, outcome, _ = command(*how)
    run = backend.runs[outcome["run_id"]]
    theirs = [version for versions in backend.versions.values() for version in versions]
    for sent in theirs or [run]:
        spec = sent["pipeline_spec"]
        spec.get("pipeline_spec", spec)["pipelineInfo"]["name"] = "churn"
    run["runtime_config"]["parameters"] = {"days": 7}
    assert submit.main([*asked, run["run_id"], "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"run {run['run_id']} is one of another pipeline, churn" in said
    assert "goes on as it was sent" not in said
    assert len(backend.runs) == 1


def test_a_run_of_ours_without_a_store_is_not_said_to_be_anothers(backend, command, capsys):
    _, outcome, _ = command()
    backend.runs[outcome["run_id"]]["runtime_config"]["parameters"] = {}
    assert submit.main(["--from", outcome["run_id"], *IMAGES]) == 2
    assert "names no store\n  fix:   pass the store's URL" in capsys.readouterr().err


def test_explain_of_a_run_that_nobody_knows(backend, capsys, tmp_path):
    place = ["--runs-dir", str(tmp_path)]
    assert submit.main(["explain", "foo", *place]) == 2
    assert "run foo not found (HTTP 404)" in capsys.readouterr().err
    assert submit.main(["explain", *place]) == 2
    assert "there is no local run yet" in capsys.readouterr().err


def test_explain_of_a_run_that_kubeflow_forgot(backend, store, capsys):
    record_plan({"publish_store": store, "publish_name": "policy"}, "gone", plan())
    assert submit.main(["explain", "gone", "--store", store, "--output", "json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"]["sft"]["state"] == "unknown"
    assert "the states of its steps are not known" in printed.err


def test_explain_passes_over_damaged_manifests_of_others(store, capsys, monkeypatch):
    """One in the store ended every explanation in a traceback."""
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    for identity, beta in (("first", 0.1), ("second", 0.2)):
        began = f"2026-01-0{len(identity) - 4}"
        record_plan({"publish_store": store, "publish_name": "policy"}, identity, plan(beta=beta))
        write_run_manifest(open_store(store), identity, began=began)
    for name, text in (("torn", b"{"), ("list", b"[]")):
        open_store(store).write(f"runs/{name}/manifest.json", text)
    assert submit.main(["explain", "second", "--store", store]) == 0
    assert "compared with first" in capsys.readouterr().out


def test_explain_without_an_endpoint_says_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    assert submit.main(["explain", "foo", "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "nothing is known of run foo" in said
    assert "--store" in said


def test_the_candidates_of_a_sweep_are_one_step_each_with_the_worst_state(backend, store, command):
    def two(first, second):
        return [
            node(f"{DAG}.one.preference", first),
            node(f"{DAG}.two.preference", second),
            node(f"{DAG}.evaluate-2", "SUCCEEDED"),
        ]

    backend.scenario = Scenario(
        tasks=[two("SUCCEEDED", "RUNNING"), two("SUCCEEDED", "SUCCEEDED")],
        on_end=verdict(store, True),
    )
    _, outcome, said = command("--wait")
    assert outcome["steps"] == {"preference": "done", "evaluate": "done"}
    told = [line for line in said.splitlines() if line.startswith("preference")]
    assert told == ["preference: running", "preference: done"]
    backend.scenario = Scenario(states=["FAILED"], tasks=[two("FAILED", "SUCCEEDED")])
    _, outcome, _ = command("--wait")
    assert outcome["steps"]["preference"] == "failed"
    assert outcome["message"] == "step preference failed"
