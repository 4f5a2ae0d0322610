"""Runs from their start to a published model: over a crash, cancelled, failed and started again.

One service for all of it, for each run takes half a minute; the tests look at what happened.
"""

import contextlib
import hashlib
import hmac
import json
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from Crypto.PublicKey import ECC

from dpo.data.toy import toy_rows
from dpo.publish.verify import verify
from tests.service.support import ServiceProcess, body
from tests.support.browser import NoBrowser, chromium

pytestmark = pytest.mark.long

SIGNING_KEY = ECC.generate(curve="ed25519").export_key(format="PEM")
SECRETS = {
    "DPO_SERVICE_CALLBACK_SECRET": "planted-secret-of-callbacks",
    "DPO_SERVICE_TOKEN": "planted-token",
    "AWS_ACCESS_KEY_ID": "planted-store-id",
    "AWS_SECRET_ACCESS_KEY": "planted-store-key",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "MINIO_ROOT_PASSWORD": "planted-root-password",
    "GOOGLE_SECRET_ACCESS_KEY": "planted-google-key",
    "HF_TOKEN": "planted-hub-token",
    "WANDB_API_KEY": "planted-wandb-key",
    "KF_PIPELINES_TOKEN": "planted-kubeflow-token",
    "DPO_NOTIFY_SECRET": "planted-notification-key",
    "DPO_JUDGE_API_KEY": "planted-judge-key",
    # its only line between the marks
    "DPO_SIGNING_KEY": SIGNING_KEY.splitlines()[1],
}
SECRET = SECRETS["DPO_SERVICE_CALLBACK_SECRET"]


class Receiver:
    """Takes callbacks; refuses the first of each path, to see it tried again."""

    def __init__(self):
        self.calls = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                read = self.rfile.read(int(self.headers["Content-Length"]))
                first = all(path != self.path for path, _, _ in receiver.calls)
                receiver.calls.append((self.path, dict(self.headers), read))
                self.send_response(500 if first else 204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def alive(word):
    """Processes whose command line has this word in it."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [command] if word.encode() in command.read_bytes() else []
    return found


def planted(folder):
    """Files below the folder that hold one of the planted secrets."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and any(secret.encode() in path.read_bytes() for secret in SECRETS.values())
    ]


class Commands(threading.Thread):
    """Looks at the command line of every process, again and again, for a planted secret."""

    def __init__(self):
        super().__init__(daemon=True)
        self.found, self.seen, self.over = [], set(), threading.Event()

    def run(self):
        words = [secret.encode() for secret in SECRETS.values()]
        while not self.over.wait(0.05):
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    text = command.read_bytes()
                    self.seen.add(text)
                    self.found += [text for word in words if word in text]


def hostile(mark):
    """Eighty pairs whose every prompt attacks whoever takes text for something else."""
    attack = (
        "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
        f"{{{{7*7}}}} ${{HOME}} $(touch {mark}) '; __import__('os').system('touch {mark}') #"
    )
    rows = [{**row, "prompt": f"{attack} {row['prompt']}"} for row in toy_rows()]
    return {"communityId": "acme", "dataset": rows}


def look(client, run_id, report_file):
    """What a real browser makes of the page, the report, and the report's file without headers."""
    found = SimpleNamespace(titles=[])
    try:
        with chromium() as browser:
            context = browser.new_context(extra_http_headers=client.headers)
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{client.port}/")
            found.titles.append(page.title())
            found.states = page.locator("article .state").all_inner_texts()
            page.get_by_role("link", name="Report").first.click()
            page.wait_for_load_state()
            found.address = page.url
            found.titles.append(page.title())
            found.text = page.inner_text("body")
            page.goto(report_file.as_uri())
            found.titles.append(page.title())
    except NoBrowser:
        return None
    return found


def gone(word, seconds=20.0):
    deadline = time.monotonic() + seconds
    while alive(word) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(word)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What happened to four runs of one service."""
    found = SimpleNamespace()
    found.data = tmp_path_factory.mktemp("runs") / "data"
    receiver = Receiver()
    settings = {
        "evaluation.judge.url": f"http://{receiver.host}/judge",
        "evaluation.judge.model": "m",
        "evaluation.judge.n_tries": 1,
    }
    service = ServiceProcess(
        found.data,
        DPO_SERVICE_CALLBACK_HOSTS=receiver.host,
        DPO_SERVICE_CALLBACK_PRIVATE="true",
        DPO_SERVICE_SETTINGS=json.dumps(settings),
        DPO_JUDGE_HOSTS=receiver.host,
        DPO_NOTIFY_URL=f"http://{receiver.host}/notified",
        **{**SECRETS, "DPO_SIGNING_KEY": SIGNING_KEY},
    )
    commands = Commands()
    commands.start()
    headers = {"Authorization": f"Bearer {SECRETS['DPO_SERVICE_TOKEN']}"}
    found.mark = tmp_path_factory.getbasetemp() / "owned"
    client = service.start(headers)
    url = f"http://{receiver.host}/acme?token=1"
    first = client.post({**hostile(found.mark), "callbackUrl": url}).json["runId"]
    broken = client.post(body("broken", 60)).json["runId"]
    waiting = client.post(body("waiting", 50)).json["runId"]
    found.waiting = client.send("DELETE", f"/runs/{waiting}").json
    for path in (found.data / "store/communities/broken/data").iterdir():
        path.unlink()
    # the first run is training when everything is killed at once
    client.wait(first, until="sft")
    service.end(signal.SIGKILL)
    found.all_gone = gone(str(found.data / "work"))
    found.planted = planted(found.data)
    client = service.start(headers)
    client.get("/runs/%1b%5b31m%0aforged")
    found.first = client.wait(first)
    found.report = client.get(f"/runs/{first}/report")
    found.page = client.get("/").body.decode()
    report_file = found.data / f"store/communities/acme/runs/{first}/report.html"
    found.seen = look(client, first, report_file)
    found.broken = client.wait(broken)
    # the same request again: the data is stored anew, and the run is cancelled on its way
    again = client.post(body("broken", 60))
    found.again_status = again.status
    again_id = again.json["runId"]
    client.wait(again_id, until="ingest")
    found.cancelling = client.send("DELETE", f"/runs/{again_id}").json
    found.again = client.wait(again_id)
    found.too_late = client.send("DELETE", f"/runs/{again_id}")
    found.metrics = client.get("/metrics").body.decode()
    found.ready = client.get("/ready")
    found.listed = [run["runId"] for run in client.get("/runs").json["runs"]]
    found.ids = [first, broken, waiting, again_id]
    deadline = time.monotonic() + 30
    while client.run(first)["callback"] != "delivered" and time.monotonic() < deadline:
        time.sleep(0.2)
    # a run is told as ended before its folder is removed
    while any((found.data / "work").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.2)
    found.callback = client.run(first)["callback"]
    found.all_calls = receiver.calls
    found.calls = [call for call in receiver.calls if call[0].startswith("/acme")]
    found.exit_code = service.end(signal.SIGTERM)
    commands.over.set()
    commands.join()
    found.in_commands, found.commands = commands.found, commands.seen
    found.log = service.log.read_text()
    found.planted += planted(found.data)
    receiver.server.shutdown()
    receiver.server.server_close()
    return found


def test_a_killed_run_goes_on_and_is_published(story):
    assert story.all_gone
    run = story.first
    assert run["state"] == "succeeded", run["message"]
    states = {step["name"]: step["state"] for step in run["steps"]}
    assert states["ingest"] == "cached"
    assert states["publish"] == "done"
    assert run["metrics"]["reward_accuracy"]["value"] > 0.9
    assert run["modelUrl"].startswith((story.data / "store/communities/acme/policy").as_uri())
    assert verify(run["modelUrl"])["name"] == "policy"
    models = list((story.data / "store/communities/acme/policy").glob("*/manifest.json"))
    assert len(models) == 1


def test_every_accepted_run_exists_once(story):
    assert sorted(story.listed) == sorted(story.ids)


def test_the_report_is_shown_without_scripts(story):
    assert story.report.status == 200
    assert story.report.body.startswith(b"<!doctype html>")
    assert "sandbox" in story.report.headers["content-security-policy"]
    assert "script-src" not in story.report.headers["content-security-policy"]


def test_hostile_text_stays_text_in_a_real_browser(story):
    if story.seen is None:
        pytest.skip("no chromium was found: run `make setup-system`")
    assert story.seen.states[-1] == "succeeded"
    assert story.seen.address.endswith(f"/runs/{story.ids[0]}/report")
    # the attack is there to be read, and was not carried out
    assert "<script>document.title='owned'</script>" in story.seen.text
    assert "{{7*7}}" in story.seen.text
    assert "owned" not in " ".join(story.seen.titles)


def test_hostile_text_runs_no_command(story):
    assert not story.mark.exists()


def test_secrets_are_in_no_output_of_a_run(story):
    assert story.in_commands == []
    # the steps' processes were among those that were looked at
    assert any(b"one_run" in command for command in story.commands)
    assert story.planted == []
    assert not any(secret in story.log for secret in SECRETS.values())


def test_each_secret_was_used_where_it_belongs(story):
    """Else the search above would have nothing to find."""
    judged = [headers for path, headers, _ in story.all_calls if path.startswith("/judge")]
    assert judged[0]["Authorization"] == f"Bearer {SECRETS['DPO_JUDGE_API_KEY']}"
    (sent, headers), *_ = [(b, h) for path, h, b in story.all_calls if path == "/notified"]
    expected = hmac.new(SECRETS["DPO_NOTIFY_SECRET"].encode(), sent, hashlib.sha256).hexdigest()
    assert headers["X-DPO-Signature"] == f"sha256={expected}"
    (manifest,) = (story.data / "store/communities/acme/policy").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["signature"]["algorithm"] == "ed25519"


def test_the_page_shows_the_runs(story):
    assert f'href="runs/{story.ids[0]}/report"' in story.page
    assert "succeeded" in story.page


def test_a_waiting_run_is_cancelled_at_once(story):
    assert story.waiting["state"] == "cancelled"
    assert story.waiting["started"] is None


def test_a_failed_run_says_why_without_paths_of_this_machine(story):
    assert story.broken["state"] == "failed"
    assert "there is no such file or folder" in story.broken["message"]
    assert str(story.data) not in story.broken["message"]


def test_a_failed_run_is_started_again_and_cancelled_while_running(story):
    assert story.again_status == 202
    assert story.cancelling["cancelling"] is True
    assert story.again["state"] == "cancelled"
    assert story.too_late.status == 409


def test_nothing_temporary_is_left(story):
    assert list((story.data / "work").iterdir()) == []
    assert list((story.data / "incoming").iterdir()) == []


def test_the_callback_is_signed_and_tried_again(story):
    assert story.callback == "delivered"
    assert [path for path, _, _ in story.calls] == ["/acme?token=1"] * 2
    _, headers, sent = story.calls[-1]
    expected = hmac.new(SECRET.encode(), sent, hashlib.sha256).hexdigest()
    assert headers["X-DPO-Signature"] == f"sha256={expected}"
    message = json.loads(sent)
    assert (message["runId"], message["state"]) == (story.ids[0], "succeeded")
    assert message["modelUrl"] == story.first["modelUrl"]


def test_figures_and_readiness(story):
    assert story.ready.json == {
        "status": "ready",
        "checks": {"store": "ok", "pipeline": "ok", "worker": "ok"},
    }
    assert 'dpo_runs{state="succeeded"} 1.0' in story.metrics
    assert 'dpo_runs{state="cancelled"} 2.0' in story.metrics
    assert 'dpo_runs{state="queued"} 0.0' in story.metrics
    assert 'dpo_runs_ended_lately{state="cancelled"} 2.0' in story.metrics
    assert 'dpo_requests_total{route="/trigger-finetune",status="202"} 1.0' in story.metrics


def test_the_log_is_json_lines_without_secrets(story):
    # Python itself and `dpo fetch` write a line of their own
    entries = [json.loads(line) for line in story.log.splitlines() if line.startswith("{")]
    started = [e for e in entries if e["message"] == "run started" and e["run_id"] == story.ids[0]]
    # before the crash and after it, under the request that asked for it
    assert len(started) == 2
    assert started[0]["request_id"] == started[1]["request_id"]
    assert "\x1b" not in story.log
    assert any(e.get("path") == "/runs/\x1b[31m\nforged" for e in entries)
    assert story.exit_code == 0
