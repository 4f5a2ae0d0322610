"""How an endpoint is reached, and what happens when it is not."""

import time

import pytest

from dpo.errors import StoreUnavailable
from dpo.storage.store import open_store
from pipelines import watch
from tests.support.certificates import self_signed
from tests.support.kfp_backend import STEPS, Fault, Scenario, running_backend
from tests.support.submitted import all_done, verdict
from tests.support.workflow import task


def test_an_endpoint_without_a_scheme_is_one_of_https(command, monkeypatch, backend):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "127.0.0.1:9/pipeline")
    code, _, said = command()
    assert code == 2
    assert "where: https://127.0.0.1:9/pipeline" in said
    assert "Warning" not in said


def test_a_few_failing_answers_are_lived_with(backend, store, command):
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, True))
    backend.faults = [Fault(r"/runs/[^/]+$", times=3), Fault(r"/runs/[^/]+$", times=2, cut=True)]
    code, _, _ = command("--wait")
    assert code == 0
    assert [fault.times for fault in backend.faults] == [0, 0]


def test_an_endpoint_that_comes_back_before_the_deadline_is_waited_for(backend, store, command):
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, True))
    backend.faults = [Fault(r"/runs/[^/]+$", status=503, times=20, message="no healthy upstream")]
    code, _, said = command("--wait", "--timeout-seconds", "60")
    assert code == 0
    assert said.count("no healthy upstream (HTTP 503); asking again") == 1


@pytest.mark.parametrize(
    ("status", "words"), [(503, "no healthy upstream (HTTP 503)"), (401, "upstream (HTTP 401)")]
)
def test_a_run_that_cannot_be_followed_any_more_is_no_failed_run(
    backend, command, monkeypatch, status, words
):
    monkeypatch.setattr(watch, "_AWAY_SECONDS", 0.1)
    backend.faults = [
        Fault(r"/runs/[^/]+$", status=status, times=10**6, message="no healthy upstream")
    ]
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (5, "unknown")
    assert [outcome["run_id"]] == list(backend.runs)
    assert outcome["where"].endswith(outcome["run_id"])
    assert words in outcome["message"]


def test_the_deadline_holds_when_the_endpoint_does_not_answer(backend, command):
    backend.faults = [Fault(r"/runs/[^/]+$", times=9, hold_seconds=30)]
    began = time.monotonic()
    code, outcome, _ = command("--wait", "--timeout-seconds", "1")
    assert (code, outcome["state"]) == (5, "timed out")
    assert "timed out" in outcome["message"]
    assert time.monotonic() - began < 25


def test_the_deadline_holds_when_the_workflow_is_not_handed_out(backend, command):
    """An answer has 20 seconds elsewhere."""
    backend.scenario = Scenario(states=["RUNNING"], tasks=[task("sft", "RUNNING")])
    backend.faults = [Fault("/apis/v1beta1/", times=9, hold_seconds=30)]
    began = time.monotonic()
    code, outcome, _ = command("--wait", "--timeout-seconds", "1")
    assert (code, outcome["state"]) == (5, "timed out")
    assert time.monotonic() - began < 18


def test_a_renewed_token_is_read_again(backend, store, command, tmp_path, monkeypatch):
    token = tmp_path / "token"
    token.write_text("first")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))
    backend.token = "first"
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, True))
    original = backend.get_run

    def get_run(run_id):
        backend.token = "second"
        token.write_text("second")
        return original(run_id)

    backend.get_run = get_run
    code, _, _ = command("--wait")
    assert code == 0


def test_an_expired_token_is_named_before_anything_is_sent(backend, command, monkeypatch):
    backend.token = "wanted"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "old")
    code, _, said = command("--wait")
    assert code == 2, "nothing was started"
    assert "token expired (HTTP 401)" in said
    assert "renew it" in said
    # a way from http:// to https:// ends so, for urllib3 takes it for another host
    assert "if http:// leads on to https:// there, write the latter" in said
    assert not backend.runs


def test_an_endpoint_with_a_certificate_of_its_own(backend, command, tmp_path, monkeypatch):
    own, tls = self_signed(tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with running_backend(tls) as secured:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", secured.url)
        code, _, told = command()
        assert code == 2
        assert "set SSL_CERT_FILE to the file with the certificate of its authority" in told
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        assert command()[0] == 0
        assert len(secured.runs) == 1
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        code, _, told = command()
        assert code == 2
        assert "SSL_CERT_FILE names no file" in told
    # without TLS nobody reads it
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", backend.url)
    assert command()[0] == 0


def test_an_endpoint_that_is_down(command, monkeypatch, backend):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    code, _, said = command()
    assert code == 2, "nothing was started"
    assert "the endpoint does not answer" in said
    assert "http://127.0.0.1:9" in said


def test_no_endpoint_is_a_message(command, monkeypatch, backend):
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    code, _, said = command()
    assert code == 2
    assert "set KF_PIPELINES_ENDPOINT" in said


def test_rerun_reaches_the_endpoint_for_these_steps_alone(backend, command):
    _, outcome, _ = command("--rerun", "sft,publish")
    spec = backend.runs[outcome["run_id"]]["pipeline_spec"]["pipeline_spec"]
    dags = [spec["root"], *spec["components"].values()]
    tasks = {n: t for dag in dags for n, t in dag.get("dag", {}).get("tasks", {}).items()}
    cached = {n for n, t in tasks.items() if t.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"ingest", "reference", "preference", "evaluate"}


@pytest.mark.parametrize(("approved", "code"), [(True, 0), (False, 3)])
def test_a_store_that_this_machine_does_not_reach(backend, command, monkeypatch, approved, code):
    def unreachable(url, run_id):
        raise StoreUnavailable("the store does not answer", where=url)

    monkeypatch.setattr(watch, "read_run_manifest", unreachable)
    rows = [r for s in STEPS if approved or s != "publish" for r in task(s, "SUCCEEDED")]
    backend.scenario = Scenario(tasks=[rows])
    found, outcome, _ = command("--wait")
    assert found == code
    assert "the verdict is read from the run's steps" in outcome["message"]
    assert "the store does not answer" in outcome["message"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "the run's manifest cannot be read"),
        (b'{"format_version": 99}', "this version reads up to"),
    ],
)
def test_a_good_run_with_a_damaged_manifest_has_not_failed(
    backend, command, store, monkeypatch, text, said
):
    """It was told as failed, without a link, as if nothing were known of it."""
    read = watch.read_run_manifest

    def damaged(url, run_id):
        open_store(url).write(f"runs/{run_id}/manifest.json", text)
        return read(url, run_id)

    monkeypatch.setattr(watch, "read_run_manifest", damaged)
    backend.scenario = Scenario(tasks=[[r for s in STEPS for r in task(s, "SUCCEEDED")]])
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (0, "succeeded")
    assert outcome["run_id"] in outcome["where"]
    assert "the verdict is read from the run's steps" in outcome["message"]
    assert said in outcome["message"]


def test_two_first_runs_at_once_share_the_experiment(backend, command, monkeypatch):
    """Both look for it and find none, and the second to make it was refused: no run was started."""
    command()
    looked = []

    def late(query):
        looked.append(query)
        return {} if len(looked) == 1 else type(backend).list_experiments(backend, query)

    monkeypatch.setattr(backend, "list_experiments", late)
    code, outcome, _ = command()
    assert (code, len(backend.experiments)) == (0, 1)
    assert outcome["run_id"] in backend.runs


def test_an_endpoint_that_only_the_proxy_knows(backend, command, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://kubeflow.invalid")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", backend.url)
    code, outcome, _ = command()
    assert (code, outcome["state"]) == (0, "submitted")
    assert outcome["run_id"] in backend.runs


def test_a_proxy_that_does_not_answer_is_named(backend, command, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://kubeflow.invalid")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://user:hidden@127.0.0.1:1")
    code, _, said = command()
    assert code == 2
    assert "and the proxy http://127.0.0.1:1, through which it is asked" in said
    assert "hidden" not in said


def test_a_proxy_of_another_kind_is_named(command, monkeypatch, backend):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://kubeflow.invalid")
    monkeypatch.setenv("ALL_PROXY", "socks5://gate:1080")
    code, _, said = command()
    assert code == 2
    assert "ALL_PROXY in the environment" in said
    assert "add kubeflow.invalid to NO_PROXY" in said
    assert "does not answer" not in said


LOGIN = "\n<!DOCTYPE html><html><head><title>Log in</title></head></html>"


@pytest.mark.parametrize(
    "arguments", [["--wait"], ["--upload"], ["--cancel", "r"], ["--retry", "r"]]
)
def test_a_page_that_asks_to_sign_in_is_no_answer(arguments, backend, command):
    """kfp takes it for an answer without a run in it: run None was said to be submitted."""
    backend.faults = [Fault(".*", times=99, page=LOGIN)]
    code, outcome, said = command(*arguments)
    assert (code, outcome["state"]) == (2, "not started")
    assert "a page for people and no answer of Kubeflow Pipelines' API" in said
    assert "give a token that it takes" in said


def test_a_page_in_place_of_the_run_that_is_waited_for(backend, command):
    backend.faults = [Fault(r"/runs/[^/]+$", times=99, page=LOGIN)]
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"], [outcome["run_id"]]) == (5, "unknown", list(backend.runs))


def test_the_ends_of_lines_are_no_part_of_address_and_token(backend, command, monkeypatch):
    backend.token = "of-ci"
    monkeypatch.setenv("KF_PIPELINES_TOKEN", " of-ci\n")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"{backend.url}/\n")
    code, outcome, _ = command()
    assert code == 0
    assert outcome["where"] == f"{backend.url}/#/runs/details/{outcome['run_id']}"


@pytest.mark.parametrize("token", ["Bearer of-ci", "of-\nci", "of-cí"])
def test_a_token_that_cannot_be_sent_is_not_shown(token, backend, command, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_TOKEN", token)
    code, outcome, said = command()
    assert code == 2
    assert "KF_PIPELINES_TOKEN holds" in outcome["message"]
    assert "of-" not in said + str(outcome)


@pytest.mark.parametrize("address", ["ftp://kubeflow.test", "http://", "https:///pipeline"])
def test_an_address_of_another_kind(address, backend, command, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", address)
    code, _, said = command()
    assert code == 2
    assert f"{address} is no address of an endpoint" in said
    assert "Warning" not in said


def test_an_endpoint_without_tls_is_told(backend, command, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", backend.url.removeprefix("http://"))
    code, _, said = command()
    assert code == 2
    assert "it speaks no TLS there: write http:// before its name" in said


@pytest.mark.parametrize("page", ["  ", "{}", "[1]", '{"run_id": "another"}'])
def test_an_answer_that_tells_of_no_run_is_not_waited_on_for_ever(backend, command, page):
    backend.faults = [Fault(r"/runs/[^/]+$", page=page, times=10**6)]
    code, outcome, _ = command("--wait")
    assert (code, outcome["state"]) == (5, "unknown")
    assert "it sent an answer that tells of no run" in outcome["message"]


@pytest.mark.parametrize("end", ["/", "/#/runs", "#/experiments/details/1"])
def test_the_address_of_a_page_of_the_ui_is_that_of_its_endpoint(backend, command, end):
    code, outcome, _ = command("--endpoint", f"{backend.url}{end}")
    assert code == 0
    assert outcome["where"] == f"{backend.url}/#/runs/details/{outcome['run_id']}"
    assert command("--endpoint", backend.url.replace("http", "HTTP"))[0] == 0


@pytest.mark.parametrize("status", [404, 408, 429])
def test_a_gateway_that_wants_to_be_asked_later_is_waited_for(backend, store, command, status):
    """A 404 that is not the API's own was told as a run that failed, the others given up soon."""
    backend.scenario = Scenario(tasks=[all_done()], on_end=verdict(store, True))
    backend.faults = [Fault(r"/runs/[^/]+$", status=status, times=20, message="later")]
    code, _, said = command("--wait", "--timeout-seconds", "60")
    assert code == 0
    assert said.count(f"later (HTTP {status}); asking again") == 1


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00s3cret", b"Bearer s3cret", b"s3cret\nmore", b"", b"\n", None]
)
def test_a_file_that_holds_no_token_is_named(backend, command, monkeypatch, tmp_path, content):
    """kfp passed it on: "invalid start byte", or http.client showed it."""
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    code, outcome, said = command()
    assert code == 2
    assert f"where: {tmp_path / 'token'}" in said
    assert "check KF_PIPELINES_ENDPOINT" not in said
    assert "s3cret" not in said + str(outcome)
    assert not backend.requests
    # a token that is given is enough
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "given")
    assert command()[0] == 0


def test_the_address_of_the_ui_is_one(backend, command, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "kubeflow.test/#/runs")
    code, outcome, _ = command()
    assert code == 0
    assert outcome["where"] == f"https://kubeflow.test/#/runs/details/{outcome['run_id']}"
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "kube flow")
    code, _, said = command()
    assert (code, len(backend.runs)) == (2, 1)
    assert "https://kube flow is no address of an endpoint" in said
    assert "where: KF_PIPELINES_UI_ENDPOINT" in said


def test_a_lines_end_of_a_variable_is_no_part_of_a_name(backend, command, monkeypatch):
    """A ConfigMap made of a file brings one; the profile was not found, the experiment another."""
    backend.has_users = True
    for name, value in (("NAMESPACE", "team\n"), ("DEFAULT_EXPERIMENT_NAME", "nightly\n")):
        monkeypatch.setenv(f"KF_PIPELINES_{name}", value)
    assert command()[0] == 0
    (made,) = backend.experiments.values()
    assert (made["namespace"], made["display_name"]) == ("team", "nightly")
