"""What is sent to an endpoint: once, where it was registered, and not what cannot work there."""

import contextlib
import re
import time

import pytest
import yaml
from urllib3.exceptions import HTTPError

from dpo.errors import ConfigError, PipelineError
from pipelines import cluster, connection, on_cluster, package, sending, submit
from pipelines.request import check_lengths, check_texts
from tests.support.kfp_backend import Fault, Scenario


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ((), "publish_store"),
        (("--deploy", "model_cache.claim=m", "--deploy", "model_cache.mount_path={root}"), ""),
        (("--store", "s3://bucket", "--deploy", "checkpoint_uri=file:///x"), "checkpoint_uri"),
        (("--store", "s3://bucket", "--deploy", "checkpoint_uri=/x"), "checkpoint_uri"),
        (("--store", "file://{root}-beside", "--deploy", "model_cache.claim=m"), "publish_store"),
    ],
)
def test_a_folder_that_dies_with_its_pod_is_no_store(
    backend, command, monkeypatch, tmp_path, settings, refused
):
    monkeypatch.delenv("DPO_SHARED_FOLDER")
    code, _, said = command(*(word.format(root=tmp_path) for word in settings))
    assert code == (2 if refused else 0)
    assert len(backend.runs) == (0 if refused else 1)
    if refused:
        assert "is a folder of each pod's own" in said
        assert f"where: {refused}" in said


@pytest.mark.parametrize(
    ("setting", "refused"),
    [
        ("datasets=[{root}/here/pairs.jsonl,hh_sample]", "datasets"),
        ("datasets=['{root}/here/*.jsonl']", "datasets"),
        ("data_uri=file://{root}/here", "data_uri"),
        ("sft_model_uri={root}/here", "sft_model_uri"),
        ("model={root}/here", "model"),
        ("sft.chat_template={root}/here/template.jinja", "chat_template"),
        ("sft.chat_template='{root}/here/template.jinja'", "chat_template"),
        # not here: it may be in the image
        ("model={root}/there", ""),
        ("model=~nobody-of-this-name/m", ""),
        ("datasets=[~nobody-of-this-name/m.jsonl]", ""),
        # what a pod looks for on the hub, whatever lies here
        ("model=owner/name", ""),
        ("datasets=[s3://bucket/pairs.jsonl]", ""),
        ("datasets=[{root}/here/../shared/pairs.jsonl]", ""),
    ],
)
def test_what_lies_on_this_machine_alone_is_no_input_of_a_pod(
    backend, command, monkeypatch, tmp_path, setting, refused
):
    for folder in ("here", "shared"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pairs.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "here/template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_SHARED_FOLDER", str(tmp_path / "shared"))
    asked = ("--store", "s3://bucket", "--set", setting.format(root=tmp_path))
    code, _, said = command(*asked)
    assert code == (2 if refused else 0)
    assert len(backend.runs) == (0 if refused else 1)
    if refused:
        assert "lies on this machine, and nothing says that the run's pods see it" in said
        assert f"where: {refused}" in said
        assert "DPO_SHARED_FOLDER" in said


def test_a_template_longer_than_a_files_name_is_no_file(backend, command):
    template = "{% for message in messages %}" + "{{ message.content }}" * 300 + "{% endfor %}"
    asked = ("--store", "s3://bucket", "--set", f"sft.chat_template='{template}'")
    code, _, said = command(*asked)
    assert (code, len(backend.runs)) == (0, 1), said


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        # what Argo 4.0.5 did with each in a workflow of this pipeline's: another text
        ("{{workflow.name}}", True),
        ("{{= 1+1 }}", True),
        # an end ("failed to resolve") or a wait without one
        ("{{ item.content }}", True),
        ("{{ tasks }}", True),
        ("{{ steps.a }}", True),
        # Kubeflow's launcher puts all of a step's inputs there
        ("{{$}}", True),
        # Kubernetes 1.34's Expand makes "$x$" and "/root" of them
        ("$$x$$", True),
        ("$(HOME)", True),
        # left as they are
        ("{{ item['content'] }}", False),
        ("{{ messages }}", False),
        ("^[^$]+$|$5|$(pwd)", False),
        ("{{- message.content }}", False),
        ("{{ tasks_of_the_day }}", False),
    ],
)
def test_a_text_that_would_reach_the_steps_as_another_is_refused(text, refused):
    template = f"chat_template={{% for item in messages %}}{text}{{% endfor %}}"
    for values in ({"model": text}, {"sft_overrides": ["lr=1e-5", template]}):
        with pytest.raises(ConfigError) if refused else contextlib.nullcontext():
            check_texts(values)


def test_so_is_such_a_name_of_a_run():
    values = {"publish_name": "policy"}
    assert on_cluster.name_of("nightly {beta: 0.1}", values) == "nightly {beta: 0.1}"
    with pytest.raises(ConfigError, match="means something to the cluster") as refused:
        on_cluster.name_of("nightly {{workflow.name}}", values)
    assert refused.value.where == "--run-name"


def test_settings_that_are_longer_than_an_argument_may_be_are_refused():
    """Linux gives a process no argument of 128 KiB: the step would not even begin."""
    files = [f"s3://bucket/some/prefix/part-{number:05d}.jsonl" for number in range(400)]
    check_lengths({"datasets": files[:200]})
    with pytest.raises(ConfigError, match="settings of step ingest") as refused:
        check_lengths({"datasets": files})
    assert "globs" in refused.value.fix


@pytest.mark.parametrize("where", ["--local", "--dry-run"])
def test_neither_does_a_local_run_begin_with_them(tmp_path, capsys, where):
    files = ",".join(f"/data/some/folder/part-{number:05d}.jsonl" for number in range(400))
    given = [where, "--runs-dir", str(tmp_path), "--set", f"datasets=[{files}]"]
    assert submit.main(given) == 2
    said = capsys.readouterr().err
    assert "settings of step ingest" in said
    assert "where: datasets" in said


def test_such_a_text_is_not_sent(backend, command):
    template = "{% for item in messages %}{{ item.content }}{% endfor %}"
    asked = ("--store", "s3://bucket", "--set", f'sft.chat_template="{template}"')
    code, _, said = command(*asked)
    assert (code, len(backend.runs)) == (2, 0), said
    assert "{{ item.content }} means something to the cluster" in said
    assert "where: sft_overrides" in said


@pytest.mark.parametrize("asked", ["GET", "POST"])
def test_no_request_waits_for_ever(backend, monkeypatch, asked):
    client = cluster.connect(cluster.endpoint())
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(connection, "_CHANGE_SECONDS", 0.2)
    backend.faults = [Fault(r"/experiments$", times=9, method=asked, hold_seconds=20)]
    began = time.monotonic()
    with pytest.raises(HTTPError):
        client.create_experiment("e") if asked == "POST" else client.list_experiments()
    assert time.monotonic() - began < 10


def test_an_answer_that_comes_byte_by_byte_is_no_way_around_the_limit(backend, monkeypatch):
    client = cluster.connect(cluster.endpoint())
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.2)
    backend.faults = [Fault(r"/experiments$", times=9, page="{}" + " " * 200, byte_seconds=0.05)]
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not complete after 0\.4 s"):
        client.list_experiments()
    assert time.monotonic() - began < 5


def test_neither_is_it_while_a_run_is_waited_for(backend, command):
    states = [Fault(r"/runs/[^/]+$", times=99, page="{}" + " " * 900, byte_seconds=0.02)]
    backend.scenario = Scenario(states=["RUNNING"])
    backend.faults = states
    began = time.monotonic()
    code, outcome, _ = command("--wait", "--timeout-seconds", "2")
    assert (code, outcome["state"]) == (5, "timed out")
    # no more digits than somebody reads
    assert re.search(r"not complete after [\d.]{1,4} s", outcome["message"])
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("status", [500, 502])
def test_a_lost_answer_starts_no_second_run(backend, command, monkeypatch, status):
    monkeypatch.setattr(sending, "_LOOKS_SECONDS", (0.0, 0.0))
    _, first, _ = command("--run-name", "mine")
    backend.faults = [Fault(r"/runs$", status=status, method="POST", after=True)]
    code, second, _ = command("--run-name", "mine")
    assert (code, second["state"]) == (0, "submitted")
    assert list(backend.runs) == [first["run_id"], second["run_id"]]
    assert first["run_id"] != second["run_id"]


def test_an_answer_that_is_lost_with_the_request_says_that_no_run_was_started(
    backend, command, monkeypatch
):
    monkeypatch.setattr(sending, "_LOOKS_SECONDS", (0.0, 0.0))
    backend.faults = [Fault(r"/runs$", status=502, method="POST")]
    code, _, said = command("--run-name", "mine")
    assert code == 1
    assert "it has no new one named 'mine': send it again" in said
    backend.faults = [
        Fault(r"/runs$", status=502, method="POST", after=True),
        # the first look, before the run is sent, is answered
        Fault(r"/runs$", status=502, method="GET", times=0),
    ]
    original = backend.create_run

    def create_run(body):
        backend.faults[1].times = 9
        return original(body)

    backend.create_run = create_run
    code, _, said = command("--run-name", "mine")
    assert code == 1
    assert "look for 'mine' at" in said
    assert len(backend.runs) == 1


def test_a_package_that_cannot_be_written_started_nothing(command, tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "package.yaml")
    code, _, said = command("--dry-run", "--set", "model=tiny", "--package", place)
    assert code == 2
    assert place in said
    code, _, said = command(
        "--dry-run", "--set", "model=tiny", "--runs-dir", str(tmp_path / "file")
    )
    assert code == 2
    assert "name another file with --package, or another folder with --runs-dir" in said


def test_a_dry_run_for_kubeflow_says_what_it_compared_with(capsys, store, monkeypatch, tmp_path):
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)
    place = ["--runs-dir", str(tmp_path), "--set", "model=tiny", "--store", store]
    assert submit.main([*place, "--dry-run"]) == 0
    assert "Kubeflow may have more of it in its cache" in capsys.readouterr().out


def test_a_refused_run_is_told_from_one_that_failed(backend, command):
    backend.faults = [Fault(r"/runs$", status=400, method="POST", message="no such field")]
    code, _, said = command()
    assert code == 2
    assert "the endpoint refused the run: no such field (HTTP 400)" in said


@pytest.mark.parametrize("status", [403, 500])
def test_a_run_that_is_not_known_to_end_is_not_said_to_have_never_begun(
    backend, command, monkeypatch, status
):
    """A token that ran out, while CI ends the job: it must not send another run."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(on_cluster, "wait", interrupted)
    backend.faults = [Fault(r":terminate$", status=status, method="POST", times=99)]
    code, outcome, said = command("--wait", "--cancel-on-interrupt")
    assert code == 130
    assert outcome["state"] == "interrupted"
    assert outcome["run_id"] in backend.runs
    assert "Whether the run ends is not known" in said


def test_runs_that_nobody_named_have_names_of_their_own(backend, command):
    command()
    command()
    assert len({run["display_name"] for run in backend.runs.values()}) == 2


def test_uploading_finds_its_version_among_hundreds(backend, command):
    command("--upload")
    (versions,) = backend.versions.values()
    others = [{**versions[0], "display_name": f"other-{number}"} for number in range(250)]
    versions[:0] = others
    code, _, said = command("--upload", "--set", "seed=1")
    assert code == 0
    assert "was registered before" in said
    assert "registered without --set: values are given with each run" in said


def test_a_pipeline_of_the_same_name_in_another_namespace_is_not_ours(backend, command):
    _, theirs, _ = command("--upload", "--namespace", "theirs")
    _, ours, _ = command("--upload", "--namespace", "ours")
    assert theirs["where"] != ours["where"]
    code, again, said = command("--upload", "--namespace", "ours")
    assert code == 0
    assert "was registered before" in said
    assert again["where"] == ours["where"]
    assert {p["namespace"] for p in backend.pipelines.values()} == {"ours", "theirs"}


def test_uploading_twice_registers_once(backend, command):
    code, outcome, said = command("--upload")
    assert code == 0
    assert "registered" in said
    assert not backend.runs
    (pipeline,) = backend.pipelines.values()
    assert pipeline["display_name"] == "preference-fine-tuning"
    versions = len(backend.versions[pipeline["pipeline_id"]])
    _, again, said = command("--upload")
    assert "was registered before" in said
    assert again["where"] == outcome["where"]
    assert len(backend.versions[pipeline["pipeline_id"]]) == versions
    command("--upload", "--deploy", "train.memory=9Gi")
    assert len(backend.pipelines) == 1
    assert len(backend.versions[pipeline["pipeline_id"]]) == versions + 1


@pytest.mark.parametrize("looked_for", ["list_pipelines", "list_versions"])
def test_what_another_registers_meanwhile_is_used(backend, command, monkeypatch, looked_for):
    """Two CI jobs of one commit: each looks before the other has sent it."""
    _, theirs, _ = command("--upload")
    found = getattr(backend, looked_for)
    answers = iter([{"total_size": 0}])
    monkeypatch.setattr(backend, looked_for, lambda *asked: next(answers, None) or found(*asked))
    # the first look finds nothing
    code, ours, said = command("--upload")
    assert code == 0, said
    assert ours["where"] == theirs["where"]
    assert "was registered before" in said
    assert len(backend.pipelines) == 1


def test_a_run_of_an_uploaded_package_is_linked_to_its_version(backend, command):
    _, outcome, _ = command("--upload", "--run")
    reference = backend.runs[outcome["run_id"]]["pipeline_version_reference"]
    (pipeline,) = backend.pipelines
    ids = {version["pipeline_version_id"] for version in backend.versions[pipeline]}
    assert reference["pipeline_id"] == pipeline
    assert reference["pipeline_version_id"] in ids


def test_a_schedule_starts_no_run_now(backend, command):
    code, outcome, said = command("--schedule", "0 0 3 * * *", "--run-name", "nightly")
    assert code == 0
    assert not backend.runs
    (made,) = backend.schedules.values()
    assert made["recurring_run_id"] == outcome["run_id"]
    assert f"{backend.url}/#/recurringrun/details/{outcome['run_id']}" in said.splitlines()
    assert made["display_name"] == "nightly"
    assert made["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert int(made["max_concurrency"]) == 1


def test_a_schedule_of_an_uploaded_package_is_linked_to_its_version(backend, command):
    command("--upload", "--schedule", "0 0 3 * * *")
    (made,) = backend.schedules.values()
    (versions,) = backend.versions.values()
    reference = made["pipeline_version_reference"]["pipeline_version_id"]
    assert reference in {version["pipeline_version_id"] for version in versions}
    assert not backend.runs


def test_a_schedule_of_five_fields_is_refused_here(backend, command):
    code, _, said = command("--schedule", "0 3 * * *")
    assert code == 2
    assert "has 5 fields" in said
    assert not backend.schedules


def test_a_schedule_of_impossible_times_is_not_sent(backend, command):
    code, _, said = command("--schedule", "0 61 * * * *")
    assert code == 2
    assert "'61' in the schedule '0 61 * * * *' is no minute (0 to 59)" in said
    assert not any(path.endswith("/recurringruns") for _, path in backend.requests)


def lost_answers(backend, path):
    """The next request of that path is carried out or not, and has no answer either way."""
    return [Fault(path, status=502, method="POST", after=True)], [
        Fault(path, status=502, method="POST")
    ]


def test_a_schedule_whose_answer_is_lost_is_looked_for(backend, command, monkeypatch):
    monkeypatch.setattr(sending, "_LOOKS_SECONDS", (0.0, 0.0))
    asked = ("--schedule", "0 0 3 * * *", "--run-name", "nightly")
    _, first, _ = command(*asked)
    done, not_done = lost_answers(backend, r"/recurringruns$")
    backend.faults = done
    code, second, said = command(*asked)
    assert (code, second["state"]) == (0, "submitted")
    assert [*backend.schedules] == [first["run_id"], second["run_id"]]
    backend.faults = not_done
    code, _, said = command(*asked)
    assert code == 1
    assert "the endpoint did not say that it has the schedule" in said
    assert "it has no new one named 'nightly': send it again" in said
    assert len(backend.schedules) == 2


def test_a_schedule_that_the_endpoint_refuses_was_not_made(backend, command):
    refusal = {"status": 400, "method": "POST", "message": "Schedule cron is not supported"}
    backend.faults = [Fault(r"/recurringruns$", **refusal)]
    code, _, said = command("--schedule", "@every 0h")
    assert code == 2
    assert "the endpoint refused the schedule: Schedule cron is not supported (HTTP 400)" in said


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_retry_whose_answer_is_lost_is_known_by_the_run(
    backend, command, monkeypatch, carried_out
):
    monkeypatch.setattr(sending, "_LOOKS_SECONDS", (0.0, 0.0))
    backend.scenario = Scenario(states=["FAILED"])
    _, outcome, _ = command("--wait")
    run_id = outcome["run_id"]
    backend.scenario = Scenario(states=["RUNNING"])
    backend.faults = lost_answers(backend, r":retry$")[0 if carried_out else 1]
    code, again, said = command("--retry", run_id)
    assert code == (0 if carried_out else 1)
    if carried_out:
        assert again["run_id"] == run_id
    else:
        assert f"the endpoint did not say that run {run_id} goes on" in said
        assert "it does not go on: send it again" in said
        assert backend.runs[run_id]["state"] == "FAILED"


@pytest.mark.parametrize(("status", "code"), [(400, 2), (401, 2), (502, 1)])
def test_a_run_that_is_not_ended_says_whether_it_was_refused(backend, command, status, code):
    backend.scenario = Scenario(states=["RUNNING"])
    _, outcome, _ = command()
    backend.faults = [Fault(r":terminate$", status=status, method="POST")]
    found, _, said = command("--cancel", outcome["run_id"])
    assert found == code
    assert ("cannot be cancelled" in said) == (code == 2)
    assert ("a run may be asked to end twice" in said) == (code == 1)


@pytest.mark.parametrize("status", [400, 502])
def test_an_upload_that_failed_started_nothing(backend, command, status):
    backend.faults = [Fault(r"/upload_version$", status=status, method="POST", after=True)]
    code, _, said = command("--upload", "--run")
    assert code == 2
    assert ("not registered twice" in said) == (status == 502)
    assert not backend.runs
    code, _, said = command("--upload")
    assert code == 0
    assert "was registered before" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"none": 1}, "parameter none is not defined"),
        ({"seed": "1"}, "input parameter seed requires type double or integer"),
        ({"gate_force": 1}, "input parameter gate_force requires type bool"),
        ({"datasets": "hh"}, "input parameter datasets requires type list"),
    ],
)
def test_a_parameter_that_the_endpoint_does_not_take(backend, tmp_path, given, said):
    target = cluster.endpoint()
    client = cluster.connect(target)
    path = tmp_path / "package.yaml"
    package.save_package(package.load_package(), path)
    with pytest.raises(PipelineError, match=said) as caught:
        sending.submit(client, target, path, given, "run")
    assert "another version" in str(caught.value)


def test_every_setting_is_sent_with_the_type_that_the_endpoint_takes(backend, command):
    settings = ("seed=3", "preference_beta=1", "gate_force=true", "datasets=hh_sample", "sft.lr=1")
    code, outcome, said = command(*(word for text in settings for word in ("--set", text)))
    assert (code, outcome["state"]) == (0, "submitted"), said


def test_another_version_of_the_pipeline_that_is_there_stays_and_ours_is_added(backend, command):
    theirs = package.load_package()
    theirs[0]["root"]["inputDefinitions"]["parameters"].pop("seed")
    name = theirs[0]["pipelineInfo"]["name"]
    there = backend.upload(name, yaml.safe_dump_all(theirs), "an older one")["pipeline_id"]
    before = [version["pipeline_version_id"] for version in backend.versions[there]]
    code, outcome, said = command("--upload", "--run")
    assert (code, outcome["state"]) == (0, "submitted")
    assert re.search(rf"pipeline {name}, version [0-9a-f]{{12}}: registered", said)
    after = [version["pipeline_version_id"] for version in backend.versions[there]]
    assert after[: len(before)] == before
    assert len(after) == len(before) + 1
    run = backend.runs[outcome["run_id"]]
    assert run["pipeline_version_reference"]["pipeline_version_id"] == after[-1]


def test_a_name_that_the_database_would_not_take_is_refused(backend, command):
    code, _, said = command("--run-name", "n" * 256)
    assert (code, len(backend.runs)) == (2, 0)
    assert "has 256 characters; Kubeflow keeps 255" in said
    assert command("--run-name", "n" * 255)[0] == 0


def test_an_experiment_that_the_endpoint_would_not_take_is_refused(backend, command):
    """``Experiment.Name length cannot exceed 128``, in bytes, says its API server (2.15)."""
    code, _, said = command("--experiment", "ä" * 65)
    assert (code, len(backend.requests)) == (2, 0)
    assert "has 130 bytes; Kubeflow takes 128" in said
    assert command("--experiment", "ä" * 64)[0] == 0


@pytest.mark.parametrize("answer", ["", "ok", "{}"])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_answer_without_an_id_starts_no_run_none(
    backend, command, monkeypatch, answer, is_there
):
    """``.../runs/details/None`` was printed, and exit code 0."""
    monkeypatch.setattr(sending, "_LOOKS_SECONDS", (0.0,))
    fault = {"page": answer or " ", "method": "POST", "after": is_there}
    backend.faults = [Fault(r"/v2beta1/runs$", **fault)]
    code, outcome, said = command("--run-name", "mine")
    assert code == (0 if is_there else 1)
    assert ([outcome.get("run_id")] == [*backend.runs]) == is_there
    assert ("its answer holds no id" in said) != is_there
    backend.faults = [Fault(r"/recurringruns$", **fault)]
    code, outcome, _ = command("--schedule", "0 0 3 * * *", "--run-name", "mine")
    assert code == (0 if is_there else 1)
    assert ([outcome.get("run_id")] == [*backend.schedules]) == is_there
    backend.faults = [Fault(r"/upload_version$", **fault)]
    code, _, said = command("--upload")
    assert code == 2
    assert "its answer holds no id" in said
    assert "not registered twice" in said
