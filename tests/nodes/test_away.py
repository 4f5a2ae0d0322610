"""A Kubernetes API that is away for a while, as when its control plane is upgraded: the nodes train
on, and so the step that follows them must not end."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes import client as k

from dpo.config.nodes import NodesConfig, NodesOptions
from dpo.errors import TrainingError, TrainingStopped
from dpo.nodes import run
from dpo.nodes.cluster import Cluster, Unreachable

CUT = object()
JOB = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs"
PODS = "/api/v1/namespaces/team/pods"
POD = {
    "metadata": {"name": "job-node-0-0"},
    "spec": {"containers": [{"name": "node"}]},
    "status": {"phase": "Running"},
}


def job(**condition):
    conditions = [{"status": "True", **condition}] if condition else []
    return {"metadata": {"name": "job"}, "status": {"conditions": conditions}}


@contextmanager
def serving(answers):
    """An API whose answers to a method and path are used up one by one; the last one stays.

    Yields a client of it, and what was asked.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            url = urlsplit(self.path)
            asked.append((self.command, url.path, parse_qs(url.query)))
            left = answers[self.command, url.path]
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer is CUT:
                self.close_connection = True
                return
            status, body = answer if isinstance(answer, tuple) else (200, answer)
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    settings = k.Configuration(host=f"http://127.0.0.1:{server.server_port}")
    try:
        with k.ApiClient(settings) as client:
            yield Cluster("TrainJob", "team", client), asked
    finally:
        server.shutdown()
        server.server_close()


def follower(cluster, count=1, **values):
    config = NodesConfig(options=NodesOptions(count=count), **DEPLOYED, **values)
    return run._Follower(cluster, config, SimpleNamespace(job_name="job", stage="sft"), 0.01)


UNAVAILABLE = 503, {"message": "the server is currently unable to handle the request"}
DEPLOYED = {"image": "r/train:1", "resources": {}}


def test_a_step_follows_its_job_through_an_outage(capfd):
    done = job(type="Complete")
    answers = {
        ("GET", f"{JOB}/job"): [job(), UNAVAILABLE, CUT, CUT, CUT, CUT, (429, {}), job(), done],
        ("GET", PODS): [{"items": [POD]}, UNAVAILABLE, {"items": [POD]}],
        ("GET", f"{PODS}/job-node-0-0/log"): ["step 1\n"],
    }
    with serving(answers) as (cluster, _):
        follower(cluster).follow()
    said = capfd.readouterr()
    assert (said.out + said.err).count("the Kubernetes API does not answer; it is asked again") >= 1


@pytest.mark.parametrize(
    "condition",
    [
        {"reason": "DeadlineExceeded", "message": "TrainJob exceeded its active deadline"},
        {
            "reason": "PyTorchJobFailed",
            "message": "Job job has failed because it was active longer than specified deadline",
        },
    ],
    ids=["TrainJob", "PyTorchJob"],
)
def test_a_job_that_took_longer_than_it_may_is_not_told_as_a_pod_that_was_deleted(condition):
    """The conditions as Kubeflow Trainer 2.3 and the training operator 1.8 write them."""
    end = {"exitCode": TrainingStopped.exit_code, "startedAt": None, "finishedAt": None}
    ended = {"name": "node", "state": {"terminated": end}, "image": "i", "imageID": "i"}
    status = {
        "phase": "Failed",
        "containerStatuses": [{**ended, "ready": False, "restartCount": 0}],
    }
    answers = {
        ("GET", f"{JOB}/job"): [job(), job(type="Failed", **condition)],
        ("GET", PODS): [{"items": [POD]}, {"items": [{**POD, "status": status}]}],
        ("GET", f"{PODS}/job-node-0-0/log"): ["step 1\n"],
        ("DELETE", f"{JOB}/job"): [{}],
    }
    with serving(answers) as (cluster, _), pytest.raises(TrainingError) as caught:
        follower(cluster, timeout_seconds=60).follow()
    assert "the nodes trained for longer than timeout_seconds=60" in str(caught.value)
    assert "raise train.timeout_seconds" in str(caught.value)


def test_an_outage_that_does_not_end_is_told_in_the_end(monkeypatch):
    monkeypatch.setattr(run, "_AWAY_SECONDS", 0.05)
    with (
        serving({("GET", f"{JOB}/job"): [UNAVAILABLE]}) as (cluster, _),
        pytest.raises(Unreachable, match="unable to handle the request"),
    ):
        follower(cluster).follow()


def test_a_log_that_breaks_off_is_followed_again(capfd, monkeypatch):
    """From its last line on: also where it is a while before it can be read again."""
    answers = {
        ("GET", f"{JOB}/job"): [*[job()] * 4, job(type="Complete")],
        ("GET", PODS): [{"items": [POD]}],
        ("GET", f"{PODS}/job-node-0-0/log"): ["step 1\n", UNAVAILABLE, UNAVAILABLE, "step 2\n"],
    }
    now = [100.0]
    with serving(answers) as (cluster, asked):
        following = follower(cluster)

        def three_seconds(_):
            following._log.join(10)
            now[0] += 3

        clock = SimpleNamespace(monotonic=lambda: now[0], sleep=three_seconds)
        monkeypatch.setattr(run, "time", clock)
        following.follow()
    logs = [query for _, path, query in asked if path.endswith("/log")]
    assert [query.get("sinceSeconds") for query in logs] == [None, ["3"], ["6"], ["9"]]
    assert capfd.readouterr().out.splitlines()[:2] == ["step 1", "step 2"]


@pytest.mark.parametrize(("follow", "seconds"), [(True, None), (False, 60)])
def test_only_a_log_that_is_followed_may_be_silent(follow, seconds):
    given = {}
    cluster = Cluster("TrainJob", "team", k.ApiClient())
    cluster._core = SimpleNamespace(
        read_namespaced_pod_log=lambda *_, **how: given.update(how) or ()
    )
    assert list(cluster.log("job-node-0-0", follow=follow)) == []
    assert given["_request_timeout"][1] == seconds


def test_who_owns_the_job_is_asked_again_and_not_left_open(monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "launcher")
    owner = {"kind": "Workflow", "name": "run", "uid": "1", "apiVersion": "argoproj.io/v1alpha1"}
    launcher = {**POD, "metadata": {"name": "launcher", "ownerReferences": [owner]}}
    answers = [UNAVAILABLE, (403, {}), launcher]
    with serving({("GET", f"{PODS}/launcher"): answers}) as (cluster, _):
        with pytest.raises(Unreachable):
            cluster.owner()
        assert cluster.owner() is None
        assert cluster.owner().name == "run"


def test_events_about_nothing_that_has_a_name():
    about = ({}, {"name": "job-node-0"}, {"name": "other"})
    events = [
        {"metadata": {}, "involvedObject": each, "reason": "Bad", "message": str(number)}
        for number, each in enumerate(about)
    ]
    with serving({("GET", "/api/v1/namespaces/team/events"): [{"items": events}, CUT]}) as (it, _):
        assert it.events("job") == ["Bad: 1"]
        assert it.events("job") == []
