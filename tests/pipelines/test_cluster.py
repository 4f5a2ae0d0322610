"""The command on an endpoint: what it sends, what it says, how it exits."""

import pytest

from pipelines import package, submit, trouble
from tests.support.kfp_backend import STEPS, Fault, Scenario
from tests.support.submitted import all_done, verdict
from tests.support.workflow import DAG, node, pod, task


def test_an_approved_run_exits_0_and_tells_each_step(backend, store, command):
    backend.scenario = Scenario(
        tasks=[[], task("ingest", "RUNNING"), all_done()], on_end=verdict(store, True)
    )
    code, outcome, said = command("--wait")
    assert (code, outcome["state"]) == (0, "succeeded")
    assert outcome["published"]["content_hash"] == "ab" * 32
    assert outcome["steps"] == dict.fromkeys(STEPS, "done")
    lines = said.splitlines()
    assert lines[0] == f"{backend.url}/#/runs/details/{outcome['run_id']}", "the link comes first"
    assert lines[1:3] == ["ingest: running", "fingerprint: done"]


def test_what_is_sent(backend, command):
    code, outcome, _ = command("--set", "preference_beta=0.3", "--run-name", "mine")
    assert (code, outcome["state"]) == (0, "submitted")
    run = backend.runs[outcome["run_id"]]
    assert run["display_name"] == "mine"
    parameters = run["runtime_config"]["parameters"]
    assert parameters["preference_beta"] == 0.3
    assert set(parameters) == set(package.defaults(package.load_package()))
    spec = run["pipeline_spec"]
    executors = spec["pipeline_spec"]["deploymentSpec"]["executors"]
    assert executors["exec-sft"]["container"]["image"] == "registry.test/train:1"
    pods = spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert pods["exec-sft"]["imagePullPolicy"] == "IfNotPresent"
    experiment = backend.experiments[run["experiment_id"]]
    assert experiment["display_name"] == "preference-fine-tuning"


def test_the_experiment_is_made_once(backend, command):
    command()
    command()
    assert len(backend.experiments) == 1


def test_a_backend_of_several_users_is_told_the_profile(backend, command, monkeypatch):
    backend.has_users = True
    code, _, said = command()
    assert code == 2
    assert "KF_PIPELINES_NAMESPACE" in said
    monkeypatch.setenv("KF_PIPELINES_NAMESPACE", "team")
    assert command()[0] == 0
    assert command("--namespace", "other")[0] == 0
    assert [e["namespace"] for e in backend.experiments.values()] == ["team", "other"]


def test_a_refused_model_exits_3(backend, store, command):
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, False))
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (3, "refused")


def test_cached_steps_are_told_from_executed_ones(backend, store, command):
    rows = [
        *task("sft", "SKIPPED"),
        *task("preference(0)", "SUCCEEDED"),
        # a backend may tell the name shown instead of the task's
        node(f"{DAG}.Ingest and validate", "SUCCEEDED"),
    ]
    states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    backend.scenario = Scenario(states, tasks=[[], rows], on_end=verdict(store, True))
    _, outcome, said = command("--wait")
    assert outcome["steps"] == {"sft": "cached", "preference": "done", "ingest": "done"}
    assert "sft: done" not in said
    # the workflow is large: asked for once a change, and at the end
    asked = [path for _, path in backend.requests if path.startswith("/apis/v1beta1/runs/")]
    assert len(asked) == 2


@pytest.mark.parametrize("status", [404, 500])
def test_cached_steps_are_told_without_the_workflow_too(backend, store, command, status):
    """A step's executor then is the one that began and ended with it."""
    rows = [
        *task("ingest", "SKIPPED", seconds=(10, 10)),
        *task("sft", "SUCCEEDED", seconds=(20, 90)),
        *task("reference", "SKIPPED", seconds=(100, 101)),
        *task("preference", "RUNNING", seconds=(110, None)),
    ]
    backend.scenario = Scenario(
        states=["RUNNING", "SUCCEEDED"], tasks=[rows], on_end=verdict(store, True)
    )
    backend.faults = [Fault("/apis/v1beta1/", status=status, times=99)]
    _, outcome, _ = command("--wait")
    assert outcome["steps"] == {
        "ingest": "cached",
        "sft": "done",
        "reference": "cached",
        "preference": "running",
    }
    assert backend.faults[0].times == (98 if status == 404 else 97), "what is not offered"


def test_a_failed_run_exits_1_with_the_steps_own_message(backend, command):
    failed = task("sft", "FAILED", message="OOMKilled (exit code 137)")
    backend.scenario = Scenario(states=["RUNNING", "FAILED"], tasks=[failed])
    backend.logs[pod("sft.executor")] = "loading\nsft: the loss is NaN\n  fix:   lower sft_lr\n"
    code, outcome, said = command("--wait")
    assert (code, outcome["state"]) == (1, "failed")
    assert outcome["message"].splitlines()[:4] == [
        "step sft failed OOMKilled (exit code 137)",
        "  | loading",
        "  | sft: the loss is NaN",
        "  |   fix:   lower sft_lr",
    ]
    assert "Traceback" not in said
    # without the workflow the pod's name is what Kubeflow makes of the step's
    backend.faults = [Fault("/apis/v1beta1/", status=501, times=99)]
    backend.scenario = Scenario(states=["FAILED"], tasks=[failed])
    assert command("--wait")[1]["message"].splitlines()[:2] == ["step sft failed", "  | loading"]


def test_what_a_step_says_is_not_lost_in_what_kubeflow_says_around_it(backend, command):
    """Lines of the launcher as users of Kubeflow reported them, and of Argo's executor."""
    around = (
        "[KFP Executor 2024-06-10 14:24:40,767 INFO]: Looking for component `sft`\n",
        'time="2022-07-12T06:48:44.957Z" level=info msg="Starting Workflow Executor"\n',
        "I0610 14:24:34.625952      26 launcher_v2.go:193] publish success.\n",
        "F0610 14:24:34.625952      26 main.go:49] failed to execute component: exit status 1\n",
        'time=2026-07-12T06:48:44.957Z level=INFO msg="sub-process exited"\n',
        '{"time":"2026-07-12T06:48:44.957Z","level":"INFO","msg":"sub-process exited"}\n',
        "Error: exit status 1\n",
    )
    failed, own_pod = [task("sft", "FAILED")], pod("sft.executor")
    backend.scenario = Scenario(states=["FAILED"], tasks=failed)
    backend.logs[own_pod] = around[0] + "sft: the loss is NaN\n" + "".join(around[1:] * 2)
    assert command("--wait")[1]["message"].splitlines()[1:] == ["  | sft: the loss is NaN"]
    # the step's own, as torch and trainers write them
    own = [
        "W0610 14:24:34.625000 140 torch/distributed/elastic/agent/server/api.py:704] closing",
        "E0610 14:24:34.625000 140 torch/distributed/elastic/api.py:869] failed (exitcode: 1)",
        "time=3.2s step=40 loss=nan",
        '{"time": 3.2, "loss": NaN}',
    ]
    backend.scenario = Scenario(states=["FAILED"], tasks=failed)
    backend.logs[own_pod] = "\n".join([*own, *around])
    shown = command("--wait")[1]["message"].splitlines()[1:]
    assert shown == [f"  | {line}" for line in own]
    # a launcher that never came to the step
    backend.scenario = Scenario(states=["FAILED"], tasks=failed)
    backend.logs[own_pod] = around[3]
    assert "failed to execute component" in command("--wait")[1]["message"]


@pytest.mark.parametrize("has_workflow", [True, False])
def test_the_last_attempt_of_a_step_with_retries_says_why(backend, command, has_workflow):
    """Each attempt is a task behind the executor, which has no pod and no log of its own."""
    path, template = f"{DAG}.sft", "retry-system-container-impl"
    attempts = [f"{path}.executor({number})" for number in (0, 1)]
    after = f"{DAG}.reference-driver"
    rows = [
        node(path, "FAILED", children=[f"{path}.executor"]),
        node(f"{path}.executor", "FAILED", template, attempts, kind="Retry", message="No more"),
        node(attempts[1], "FAILED", template, [after], kind="Pod", message="OOMKilled (137)"),
        node(attempts[0], "FAILED", template, [after], kind="Pod"),
        node(after, "SKIPPED", "system-container-driver"),
    ]
    backend.scenario = Scenario(states=["FAILED"], tasks=[rows])
    names = [pod(f"sft.executor({number})", template) for number in (0, 1)]
    backend.logs |= {names[0]: "one\n", names[1]: "two\n"}
    backend.logs[pod("reference-driver", "system-container-driver")] = "of another step\n"
    if not has_workflow:
        backend.faults = [Fault("/apis/v1beta1/", status=404, times=99)]
    _, outcome, _ = command("--wait")
    why = " OOMKilled (137)" if has_workflow else ""
    assert outcome["message"].splitlines()[:2] == [f"step sft failed{why}", "  | two"]
    assert ("steps.sft.memory" in outcome["message"]) == has_workflow


def test_steps_behind_a_failed_one_are_skipped(backend, command):
    """Argo's Omitted is no state of Kubeflow's API, which calls it unspecified."""
    failed = task("sft", "FAILED")
    rows = [*failed, *task("reference", "RUNTIME_STATE_UNSPECIFIED")]
    backend.scenario = Scenario(states=["RUNNING", "FAILED"], tasks=[rows])
    _, outcome, said = command("--wait")
    assert outcome["steps"] == {"sft": "failed", "reference": "skipped"}
    assert "unspecified" not in said
    # one that goes on may just not have begun
    backend.scenario = Scenario(states=["RUNNING", "RUNNING", "SUCCEEDED"], tasks=[rows[3:], []])
    assert "reference" not in command("--wait")[1]["steps"]


def test_the_last_states_are_not_those_of_before_the_end(backend, store, command):
    """``ReportWorkflowResource`` stores a run's end, and its caller the tasks after that."""
    backend.scenario = Scenario(
        states=["RUNNING", "SUCCEEDED"],
        tasks=[task("publish", "RUNNING"), task("publish", "SUCCEEDED")],
        is_between=True,
        on_end=verdict(store, True),
    )
    assert command("--wait")[1]["steps"] == {"publish": "done"}


@pytest.mark.parametrize("kind", ["Pod", "HTTP"])
def test_a_step_that_kubeflow_could_not_start_is_named(backend, command, kind):
    template = "system-container-driver"
    said = "Error (exit code 1)"
    rows = [node(f"{DAG}.sft-driver(0)", "FAILED", template, kind=kind, message=said)]
    backend.scenario = Scenario(states=["FAILED"], tasks=[rows])
    backend.logs[pod("sft-driver(0)", template)] = "parent DAG does not have input parameter x\n"
    _, outcome, _ = command("--wait")
    assert outcome["message"].splitlines() == [
        f"step sft could not be started: {said}",
        "  | parent DAG does not have input parameter x",
    ]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("OOMKilled (exit code 137)", "--deploy steps.sft.memory="),
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "no node has"),
        ("Back-off pulling image: ImagePullBackOff", "image_pull_secrets"),
        ('Error: secret "store" not found', "create it"),
        ("pods is forbidden: exceeded quota: team", "quota is used up"),
        ("Pod was active longer than specified deadline: DeadlineExceeded", "timeout_seconds"),
    ],
)
def test_the_words_of_kubernetes_come_with_what_to_do(backend, command, words, advice):
    backend.scenario = Scenario(states=["FAILED"], tasks=[task("sft", "FAILED", message=words)])
    _, outcome, _ = command("--wait")
    assert words in outcome["message"]
    assert advice in outcome["message"]


def test_a_run_that_does_not_end_in_time_exits_5_and_goes_on(backend, command):
    backend.scenario = Scenario(states=["RUNNING"])
    code, outcome, _ = command("--wait", "--timeout-seconds", "0.3")
    assert (code, outcome["state"]) == (5, "timed out")
    assert "goes on" in outcome["message"]
    assert backend.runs[outcome["run_id"]]["state"] == "RUNNING"


def test_a_run_that_someone_ends_exits_4(backend, command):
    backend.scenario = Scenario(states=["RUNNING"])
    original = backend.get_run

    def get_run(run_id):
        run = original(run_id)
        if run["state"] == "RUNNING":
            backend.terminate(run_id)
        return run

    backend.get_run = get_run
    code, outcome, _ = command("--wait", "--timeout-seconds", "20")
    assert (code, outcome["state"]) == (4, "cancelled")


def test_a_retried_run_is_not_taken_for_cancelled_because_it_once_was(backend, store, command):
    backend.scenario = Scenario(states=["RUNNING"])
    _, outcome, _ = command()
    run_id = outcome["run_id"]
    backend.get_run(run_id)
    backend.terminate(run_id)
    backend.get_run(run_id)
    assert backend.runs[run_id]["state"] == "FAILED"
    backend.scenario = Scenario(states=["RUNNING", "FAILED"])
    code, outcome, _ = command("--retry", run_id, "--wait")
    assert (code, outcome["state"]) == (1, "failed")
    backend.scenario = Scenario(on_end=verdict(store, True))
    code, outcome, _ = command("--retry", run_id, "--wait")
    assert (code, outcome["run_id"]) == (0, run_id)


def test_the_failure_before_a_retry_is_not_taken_for_its_end(backend, store, command):
    failed = [task("sft", "FAILED")]
    backend.scenario = Scenario(states=["FAILED"], tasks=failed)
    _, outcome, _ = command("--wait")
    run_id = outcome["run_id"]
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, True), stale=3)
    code, outcome, said = command("--retry", run_id, "--wait")
    assert (code, outcome["state"]) == (0, "succeeded")
    assert "sft: failed" not in said


def test_a_run_that_is_told_to_have_failed_for_long_has_failed(backend, command, monkeypatch):
    monkeypatch.setattr(trouble, "_STALE_SECONDS", 0.2)
    backend.scenario = Scenario(states=["FAILED"])
    run_id = command("--wait")[1]["run_id"]
    backend.scenario = Scenario(stale=10**6)
    code, outcome, _ = command("--retry", run_id, "--wait")
    assert (code, outcome["state"]) == (1, "failed")


def test_a_run_that_goes_on_is_not_retried(backend, command):
    backend.scenario = Scenario(states=["RUNNING"])
    run_id = command()[1]["run_id"]
    code, _, said = command("--retry", run_id, "--set", "seed=1", "--ingest-shards", "2")
    assert code == 2
    assert (
        f"run {run_id} goes on as it was sent, without --set, --store, --deploy, --ingest-shards."
        in said
    )
    assert "cannot be retried: Workflow must be Failed/Error to retry" in said
    assert "its state is RUNNING: only one that has failed can be retried" in said


def test_a_run_may_be_asked_to_end_twice_and_one_that_has_ended_not(backend, command):
    backend.scenario = Scenario(states=["RUNNING"])
    run_id = command()[1]["run_id"]
    backend.get_run = lambda run_id: backend.runs[run_id]
    assert command("--cancel", run_id)[0] == 0
    assert command("--cancel", run_id)[0] == 0
    assert backend.runs[run_id]["state"] == "CANCELING"
    backend.runs[run_id]["state"] = "FAILED"
    code, _, said = command("--cancel", run_id)
    assert code == 2
    assert "not in a terminable state (HTTP 400)" in said
    assert "its state is FAILED: it has ended" in said


def test_a_succeeded_run_is_not_retried(backend, store, command):
    backend.scenario = Scenario(on_end=verdict(store, True))
    _, outcome, _ = command("--wait")
    code, outcome, said = command("--retry", outcome["run_id"])
    assert code == 2
    assert "the run has succeeded (HTTP 409)" in said


def test_cancel_ends_a_run_and_needs_neither_images_nor_a_store(backend, command, capsys):
    backend.scenario = Scenario(states=["RUNNING"])
    _, outcome, _ = command()
    assert submit.main(["--cancel", outcome["run_id"]]) == 0
    assert backend.runs[outcome["run_id"]]["state"] == "CANCELING"
    assert submit.main(["--cancel", "none"]) == 2
    assert "run none not found (HTTP 404)" in capsys.readouterr().err


def test_a_deleted_run_is_reported_at_once(backend, command, monkeypatch):
    backend.scenario = Scenario(states=["RUNNING"])
    original = backend.get_run

    def get_run(run_id):
        run = original(run_id)
        del backend.runs[run_id]
        return run

    backend.get_run = get_run
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (1, "failed")
    assert "not found (HTTP 404)" in outcome["message"]


def test_a_run_that_left_no_manifest_is_judged_by_its_steps(backend, command):
    backend.scenario = Scenario(tasks=[all_done()])
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (0, "succeeded")
    assert "left no manifest" in outcome["message"]
    backend.scenario = Scenario(tasks=[task("ingest", "SUCCEEDED")])
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (5, "unknown")
    assert "its verdict is not known" in outcome["message"]
    assert outcome["run_id"] in backend.runs


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--set", "preference_beta=-1"], "parameter preference_beta"),
        (["--set", "loss.beta=0"], "loss.beta=0"),
        (["--set", "preference_lr=-0.1"], "parameter preference_lr"),
        (["--set", "sft.batch_size=0"], "parameter sft_batch_size"),
        (["--set", "test_fraction=1.5"], "test_fraction"),
        (["--set", "max_length=16", "--set", "max_prompt_length=64"], "max_prompt_length"),
        (["--set", "preference.n_examples=0"], "n_examples=0"),
        (["--nodes", "0"], "nodes.count=0"),
        (["--ingest-shards", "1000"], "--ingest-shards"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_sent(
    backend, command, arguments, named
):
    code, _, said = command(*arguments)
    assert code == 2
    assert named in said
    assert "Traceback" not in said
    assert not backend.runs
    assert not backend.pipelines
