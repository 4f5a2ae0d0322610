"""The whole DAG through the compiled pipeline, in processes, on the tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.publish.verify import verify
from dpo.storage.manifest import read_manifest
from tests.support.checkout import Checkout
from tests.support.waiting import wait_until

CACHEABLE = ["ingest", "sft", "reference", "preference", "evaluate"]
NEVER_CACHED = ["fingerprint", "gate", "publish", "finish"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout.make(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def first(checkout):
    outcome = checkout.outcome()
    assert outcome["state"] == "succeeded", outcome
    return outcome


def cached(outcome):
    return [step for step in CACHEABLE if outcome["steps"][step] == "cached"]


def ran(outcome):
    return [step for step in CACHEABLE if outcome["steps"][step] == "done"]


def checkpoint(outcome, which="policy checkpoint"):
    return read_manifest(Path(outcome["places"][which]))


def test_every_step_runs_and_the_model_is_published(first):
    assert first["steps"] == dict.fromkeys([*CACHEABLE, *NEVER_CACHED], "done")
    assert first["exit_code"] == 0
    assert first["verdict"]["approved"]
    manifest = verify(first["published"]["url"])
    assert manifest["content_hash"] == first["published"]["content_hash"]
    assert "model.safetensors" in {entry["path"] for entry in manifest["files"]}


def test_each_manifest_names_the_outputs_that_it_was_made_from(first):
    policy, sft = checkpoint(first), checkpoint(first, "SFT checkpoint")
    assert policy.inputs["base"] == sft.content_hash
    assert policy.inputs["pairs"] == sft.inputs["pairs"]
    published = read_manifest(_newest(first, "publish"))
    assert published.inputs["policy"] == policy.content_hash


def _newest(outcome, stage):
    root = Path(outcome["places"]["policy checkpoint"]).parents[2]
    found = [
        path.parent
        for path in root.glob("*/*/*/manifest.json")
        if json.loads(path.read_text())["stage"] == stage
    ]
    return max(found, key=lambda folder: (folder / "manifest.json").stat().st_mtime)


def test_a_second_run_finds_every_cacheable_step_cached(checkout, first):
    second = checkout.outcome()
    assert cached(second) == CACHEABLE
    assert second["published"]["unchanged"]
    assert second["published"]["bytes_moved"] == 0
    assert checkpoint(second) == checkpoint(first)


def test_another_beta_reruns_preference_and_what_follows(checkout, first):
    outcome = checkout.outcome("--set", "loss.beta=0.2")
    assert ran(outcome) == ["preference", "evaluate"]
    assert checkpoint(outcome, "SFT checkpoint") == checkpoint(first, "SFT checkpoint")
    settings = checkpoint(outcome).settings
    assert settings["loss"]["beta"] == 0.2


def test_the_store_knows_a_run_by_the_id_that_is_told(checkout, first):
    found = {path.parent.name for path in _manifest_files(checkout)}
    assert first["run_id"] in found
    assert found <= {path.name for path in (checkout.folder / "runs/history").iterdir()}


def explained(checkout):
    program = [sys.executable, str(checkout.folder / "pipelines/submit.py"), "explain"]
    done = subprocess.run(
        [*program, "--runs-dir", str(checkout.folder / "runs"), "--output", "json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=checkout.folder,
        env=checkout.environment(),
    )
    return json.loads(done.stdout)["steps"]


@pytest.mark.long
def test_explain_says_which_input_made_a_step_run(checkout, first):
    checkout.outcome("--set", "loss.beta=0.3")
    steps = explained(checkout)
    assert (steps["sft"]["state"], steps["sft"]["changed"]) == ("cached", {})
    assert steps["preference"]["state"] == "done"
    (change,) = steps["preference"]["changed"]["configuration"]
    assert change.startswith("loss.beta: ")
    assert change.endswith(" → 0.3")
    assert steps["gate"]["reason"] == "never cached"


@pytest.mark.long
def test_a_run_starts_from_the_artifacts_of_an_earlier_one(checkout, first):
    outcome = checkout.outcome("--from", first["run_id"], "--set", "loss.beta=0.4")
    assert outcome["state"] == "succeeded", outcome
    taken = checkpoint(outcome, "SFT checkpoint")
    assert taken.content_hash == checkpoint(first, "SFT checkpoint").content_hash
    assert taken.details["adopted_from"] == first["places"]["SFT checkpoint"]
    assert checkpoint(outcome).settings["loss"]["beta"] == 0.4
    assert checkpoint(outcome).inputs["base"] == checkpoint(first).inputs["base"]


def test_a_run_to_start_from_that_is_not_there(checkout, first):
    done = checkout.run("--from", "none")
    assert done.returncode == 2
    assert "there is no local run none" in done.stderr


def manifests(checkout):
    """The run manifests in the store of this machine, the newest last."""
    found = [json.loads(path.read_text()) for path in _manifest_files(checkout)]
    return sorted(found, key=lambda manifest: (manifest["began"], manifest["ended"]))


def _manifest_files(checkout):
    return (checkout.folder / "runs/published/runs").glob("*/manifest.json")


def test_every_run_ends_with_its_manifest_also_one_that_failed(checkout, first):
    assert {manifest["state"] for manifest in manifests(checkout)} == {"succeeded"}
    before = checkout.data.read_text(encoding="utf-8")
    row = json.dumps({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": "", "rejected": " b"})
    checkout.data.write_text(before + f"{row}\n" * 20, encoding="utf-8")
    try:
        outcome = checkout.outcome()
    finally:
        checkout.data.write_text(before, encoding="utf-8")
    assert outcome["state"] == "failed"
    assert outcome["steps"]["ingest"] == "failed"
    assert outcome["steps"]["finish"] == "done"
    last = manifests(checkout)[-1]
    assert (last["state"], last["backend_state"]) == ("failed", "FAILED")
    assert last["parameters"]["model"] == "tiny"


def test_a_dry_run_says_what_would_run_and_why(checkout, first):
    done = checkout.run("--dry-run", "--set", "sft.lr=3e-5", "--output", "json")
    steps = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert not steps["ingest"]["runs"]
    assert "lr" in steps["sft"]["reason"]
    assert "3e-05" in steps["sft"]["reason"]
    assert steps["preference"]["reason"] == "reads the new output of sft"


@pytest.mark.long
def test_rerun_runs_a_step_again_and_what_reads_its_output(checkout, first):
    outcome = checkout.outcome("--rerun", "reference")
    assert "reference" in ran(outcome)
    assert not {"ingest", "sft"} & set(ran(outcome))
    assert checkpoint(outcome).content_hash == checkpoint(first).content_hash


@pytest.mark.long
def test_a_changed_line_of_training_code_retrains_and_does_not_ingest(checkout, first):
    checkout.edit("dpo/train/optimizer.py", "weight_decay=0.0, fused=True", "weight_decay=0.0")
    try:
        outcome = checkout.outcome()
    finally:
        checkout.edit(
            "dpo/train/optimizer.py", "weight_decay=0.0)", "weight_decay=0.0, fused=True)"
        )
    assert "ingest" in cached(outcome)
    assert {"sft", "preference"} <= set(ran(outcome))
    assert checkpoint(outcome).code != checkpoint(first).code


@pytest.mark.long
def test_a_changed_line_of_the_report_does_not_retrain(checkout, first):
    checkout.edit("dpo/evaluate/bootstrap.py", "_LEVELS = (2.5, 97.5)", "_LEVELS = (5, 95)")
    try:
        outcome = checkout.outcome()
    finally:
        checkout.edit("dpo/evaluate/bootstrap.py", "_LEVELS = (5, 95)", "_LEVELS = (2.5, 97.5)")
    assert ran(outcome) == ["evaluate"]


@pytest.mark.long
def test_a_changed_data_line_reruns_everything(checkout, first):
    before = checkout.data.read_text(encoding="utf-8")
    lines = before.splitlines(keepends=True)
    row = json.loads(lines[0])
    row["chosen"] += " Truly."
    checkout.data.write_text(json.dumps(row) + "\n" + "".join(lines[1:]), encoding="utf-8")
    try:
        outcome = checkout.outcome()
    finally:
        checkout.data.write_text(before, encoding="utf-8")
    assert ran(outcome) == CACHEABLE
    assert checkpoint(outcome).inputs["pairs"] != checkpoint(first).inputs["pairs"]


@pytest.mark.long
def test_a_damaged_output_is_made_again(checkout, first):
    model = Path(first["places"]["SFT checkpoint"]) / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[:-100])
    outcome = checkout.outcome()
    assert outcome["state"] == "succeeded"
    assert "sft" in ran(outcome)
    assert checkpoint(outcome).content_hash == checkpoint(first).content_hash


@pytest.mark.minio
def test_folder_and_bucket_hold_the_same_content(checkout, first, minio_server):
    url = "s3://models/team"
    outcome = checkout.outcome(
        *("--store", url, "--set", "publish.create_bucket=true"),
        environment=minio_server.environment(),
    )
    assert outcome["state"] == "succeeded", outcome
    assert outcome["published"]["content_hash"] == first["published"]["content_hash"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in minio_server.environment().items():
            patch.setenv(name, value)
        manifest = verify(f"{url}/policy")
    assert manifest["content_hash"] == first["published"]["content_hash"]


def test_a_refused_gate_publishes_nothing_and_has_its_own_exit_code(checkout, first):
    # under a name of its own: what is published already would pass as unchanged
    rule = ("--set", "gate.min_reward_accuracy=1", "--set", "publish.name=strict")
    done = checkout.run(*rule, "--output", "json")
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert (outcome["state"], done.returncode) == ("refused", 3)
    assert not outcome["verdict"]["approved"]
    assert not outcome["published"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "loss.bta=0.1"], ["loss.bta"]),
        (["--set", "model=none-such"], ["none-such", "tiny"]),
        (["--set", "datasets=[none-such.jsonl]"], ["none-such.jsonl"]),
        (["--store", "s3:/bucket"], ["s3:/bucket"]),
        (["--rerun", "stf"], ["stf", "sft"]),
        (
            ["--runs-dir", "/dev/null/runs"],
            ["/dev/null/runs", "another one", "--runs-dir"],
        ),
    ],
)
def test_mistakes_end_in_one_message(checkout, arguments, words):
    done = checkout.run(*arguments)
    assert done.returncode == 2, "nothing was started"
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [("", ["empty"]), ('{"prompt": "x"\n', ["line 1"])],
    ids=["empty", "not-json"],
)
def test_broken_data_ends_in_one_message_of_the_step(checkout, first, text, words):
    before = checkout.data.read_text(encoding="utf-8")
    checkout.data.write_text(text, encoding="utf-8")
    try:
        done = checkout.run()
    finally:
        checkout.data.write_text(before, encoding="utf-8")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_a_store_that_does_not_answer_is_named(checkout, first):
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "user"}
    nobody["AWS_SECRET_ACCESS_KEY"] = "planted-secret"
    done = checkout.run("--store", "s3://models", environment=nobody)
    assert done.returncode == 2, "nothing was started"
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert "planted-secret" not in done.stderr


def _wait_for(checkout, step):
    """Until ``step`` of the newest run has begun."""
    before = set((checkout.folder / "runs/history").iterdir())

    def begun():
        new = set((checkout.folder / "runs/history").iterdir()) - before
        files = [folder / "progress.jsonl" for folder in new]
        return any(f'"{step}"' in file.read_text("utf-8") for file in files if file.is_file())

    wait_until(begun, 60, lambda: f"{step} did not begin")


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="ctrl-c", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, 130, id="sigterm", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, id="kill", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_run_leaves_no_process_and_the_next_goes_on(checkout, first, how, code):
    setting = ("--set", f"sft.lr={int(how)}e-6")
    run = checkout.start(*setting)
    _wait_for(checkout, "sft")
    os.kill(run.pid, how)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code
    assert "Traceback" not in errors
    wait_until(lambda: not checkout.processes(), 20, checkout.processes)
    assert checkout.processes() == []
    outcome = checkout.outcome(*setting)
    assert outcome["state"] == "succeeded"
    assert "ingest" in cached(outcome)
    assert "sft" in ran(outcome)


@pytest.mark.long
def test_a_second_run_at_once_is_told_who_holds_the_folder(checkout, first):
    run = checkout.start("--rerun", "ingest")
    try:
        _wait_for(checkout, "fingerprint")
        other = checkout.run()
    finally:
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert other.returncode == 2, "nothing was started"
    assert "another run is using this folder" in other.stderr


def test_a_time_limit_stops_the_run_with_its_own_exit_code(checkout, first):
    done = checkout.run("--rerun", "ingest", "--timeout-seconds", "0.5")
    assert done.returncode == 5
    assert checkout.processes() == []
    newest = max((checkout.folder / "runs/history").iterdir())
    assert f"run {newest.name} was stopped after 0.5 s" in done.stderr
    assert "the same command goes on" in done.stderr
    kept = json.loads((newest / "plan.json").read_text(encoding="utf-8"))
    assert kept["states"]["publish"] == "skipped", "explain and --dry-run know of it"


@pytest.mark.long
def test_a_sweep_shares_what_comes_before_and_gates_the_best_on_the_test_part(checkout, first):
    outcome = checkout.outcome("--sweep", "loss.beta=0.1,5.0")
    assert outcome["state"] == "succeeded", outcome
    assert {step: outcome["steps"][step] for step in ("ingest", "sft", "reference")} == {
        "ingest": "cached",
        "sft": "cached",
        "reference": "cached",
    }
    policies = [
        read_manifest(path.parent, stage="preference")
        for path in (checkout.folder / "runs/artifacts").glob("*/*-iteration-*/*/*/manifest.json")
        if json.loads(path.read_text())["stage"] == "preference"
    ]
    betas = {manifest.settings["loss"]["beta"]: manifest.content_hash for manifest in policies}
    assert set(betas) == {0.1, 5.0}
    best = checkpoint(outcome)
    assert best.content_hash == betas[best.settings["loss"]["beta"]]
    verdict_folder = Path(outcome["places"]["report"]).parent
    verdict = read_manifest(verdict_folder, stage="gate")
    evaluation = read_manifest(verdict_folder.parents[1] / "evaluate-2/evaluation")
    assert verdict.inputs["evaluation"] == evaluation.content_hash
    assert evaluation.settings["evaluation"]["part"] == "test"
    assert evaluation.inputs["policy"] == best.content_hash


@pytest.mark.long
def test_a_run_that_reads_its_data_in_shards_publishes_the_same_model(checkout, first):
    outcome = checkout.outcome("--ingest-shards", "3")
    assert outcome["state"] == "succeeded", outcome
    # equal bytes of data: what follows has the same inputs
    assert checkpoint(outcome).content_hash == checkpoint(first).content_hash
    assert outcome["published"]["content_hash"] == first["published"]["content_hash"]


@pytest.mark.parametrize(
    ("sweep", "words"), [("loss.bta=1,2", "loss.bta"), ("loss.beta=-1,2", "loss.beta")]
)
def test_a_sweep_that_cannot_work_starts_nothing(checkout, sweep, words):
    done = checkout.run("--sweep", sweep)
    assert done.returncode == 2
    assert words in done.stderr


# the last one: what follows is compared with the run before it
@pytest.mark.long
def test_a_run_of_another_folder_reads_its_files_there(checkout, first, tmp_path):
    """Relative paths are the user's; a file of theirs is no module of ours, nor of Python's."""
    # other rows: what equal ones give is taken from the cache, also by the tests that follow
    rows = checkout.data.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    shutil.copytree(checkout.folder / "dpo/modeling/tiny", tmp_path / "models/mine")
    for name in ("random.py", "dpo.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    own = ["--set", "datasets=[pairs.jsonl]", "--set", "model=models/mine", "--output", "json"]
    done = subprocess.run(
        [*checkout.command(), *own],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**checkout.environment(), "PYTHONIOENCODING": "ascii"},
    )
    outcome = json.loads(done.stdout)
    assert outcome["state"] == "succeeded", done.stderr
    assert checkpoint(outcome).settings["model"]["name_or_path"] == "models/mine"
