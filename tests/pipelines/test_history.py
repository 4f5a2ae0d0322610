"""What is expected to run, from the plans of earlier runs; with a sweep, of all its candidates."""

import json

from pipelines import history, package, submit
from pipelines.explain import Told, explain
from pipelines.sweep import Sweep, parse_sweep

PLAN = {
    f"{step}_{part}": json.dumps({part: step})
    for step in ("ingest", "sft", "reference", "preference", "evaluate")
    for part in ("settings", "fingerprint")
}
DONE = dict.fromkeys(("ingest", "sft", "reference", "preference", "evaluate", "select"), "done")


def swept(*assignments):
    return history.with_candidates(PLAN, parse_sweep(assignments))


def remembered(folder, *runs):
    """A history of runs, each a plan and the states that its steps ended in."""
    for number, (plan, states) in enumerate(runs):
        place = folder / f"run-{number}"
        place.mkdir(parents=True)
        history.remember(place, plan, states)
    return folder


def expected(plan, folder):
    return {e.step: e.reason for e in history.expectations(plan, folder) if e.runs}


def test_a_sweep_that_was_never_run_trains_its_candidates(tmp_path):
    remembered(tmp_path, (PLAN, DONE))
    reasons = expected(swept("loss.beta=0.3,0.7"), tmp_path)
    assert [*reasons] == [
        *("fingerprint", "preference", "evaluate", "select", "gate", "publish", "finish")
    ]
    assert reasons["preference"] == "candidates: none → loss.beta=0.3, loss.beta=0.7"
    assert reasons["select"] == "reads the new output of preference"


def test_a_sweep_that_was_run_is_cached_in_any_order_and_a_run_without_it_is_not(tmp_path):
    remembered(tmp_path, (swept("loss.beta=0.3,0.7"), DONE))
    never = {"fingerprint", "gate", "publish", "finish"}
    assert {*expected(swept("loss.beta=0.7,0.3"), tmp_path)} == never
    assert {*expected(PLAN, tmp_path)} == {*never, "preference", "evaluate"}
    assert {*expected(swept("loss.beta=0.3,0.9"), tmp_path)} >= {"preference", "select"}


def test_a_plan_without_a_sweep_keeps_its_keys():
    assert history.with_candidates(PLAN, ()) == PLAN


def test_explain_names_the_candidates_and_what_failed():
    states = dict.fromkeys(("ingest", "sft", "reference"), "cached")
    states |= {"preference": "failed", "evaluate": "skipped", "select": "skipped"}
    before = Told("a", PLAN, DONE, {})
    failed = Told("b", swept("loss.beta=0.3,0.7"), states, {})
    lines = {line.step: line.reason for line in explain(failed, before)}
    assert lines["preference"] == "configuration: candidates: none → loss.beta=0.3, loss.beta=0.7"
    assert lines["select"] == "reads the new output of preference, evaluate"
    again = {line.step: line.reason for line in explain(failed, failed)}
    assert again["preference"] == "it failed or was stopped"
    assert again["sft"] == "nothing that it reads changed"
    finished = Told("c", failed.plan, {**states, "preference": "done"}, {})
    after = {line.step: line.reason for line in explain(finished, failed)}
    assert after["preference"] == "the run before did not finish it"
    rerun = {line.step: line.reason for line in explain(finished, finished)}
    assert rerun["preference"] == "asked for with --rerun, or the earlier result was lost"


def test_explain_lists_the_candidates_of_a_local_sweep(tmp_path, capsys):
    remembered(tmp_path / "history", (PLAN, DONE), (swept("loss.beta=0.3,0.7"), DONE))
    assert submit.main(["explain", "--runs-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["candidate loss.beta=0.3", "candidate loss.beta=0.7"]


def test_a_damaged_record_is_named(tmp_path, capsys):
    runs = remembered(tmp_path / "history", (PLAN, DONE), (PLAN, DONE))
    (runs / "run-0/plan.json").write_text("null")
    (runs / "run-0/run.json").write_text("")
    assert submit.main(["explain", "run-0", "--runs-dir", str(tmp_path)]) == 2
    assert "run run-0 is damaged\n  where: " in capsys.readouterr().err
    here = ["--local", "--runs-dir", str(tmp_path), "--dry-run"]
    assert submit.main([*here, "--from", "run-0"]) == 2
    assert "run run-0 is damaged\n  where: " in capsys.readouterr().err


def test_a_run_that_was_stopped_is_known_and_left_nothing_to_start_from(tmp_path, capsys):
    remembered(tmp_path / "history", (PLAN, {"ingest": "done", "sft": "failed"}))
    here = ["--local", "--runs-dir", str(tmp_path), "--dry-run"]
    assert submit.main([*here, "--from", "run-0"]) == 2
    said = capsys.readouterr().err
    assert "run run-0 left no artifacts to start from" in said
    assert "finished steps come from the cache" in said


def test_a_package_tells_its_candidates_also_where_ingest_is_shared():
    candidates = parse_sweep(["loss.beta=0.3,0.7"])
    assert package.candidates_of(package.local_package(Sweep(candidates, 1), 3)) == candidates
    assert package.candidates_of(package.load_package()) == ()


def test_a_step_that_takes_an_artifact_is_not_said_to_read_other_data():
    own = {"sft_fingerprint": json.dumps({"code": "c", "data": "d", "model": "m"})}
    taken = {"sft_fingerprint": json.dumps({"artifact": "a"})}
    for now, before, text in (
        (taken, own, "taken from an earlier artifact"),
        (own, taken, "no artifact is given"),
    ):
        (change,) = history.changes("sft", now, before)
        assert (change.kind, change.text) == ("artifact", text)
