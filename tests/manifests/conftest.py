"""A real control plane for all tests here, with a node for each kind of pod."""

import json
import time

import pytest

from tests.support.custom_resources import define
from tests.support.kubernetes import running_control_plane
from tests.support.programs import NotHere

WAIT_SECONDS = 120


@pytest.fixture(scope="session")
def plane(tmp_path_factory):
    try:
        with running_control_plane(tmp_path_factory.mktemp("kubernetes")) as running:
            for namespace in ("kubeflow", "team"):
                applied(running, {"kind": "Namespace", "metadata": {"name": namespace}})
                eventually(lambda n=namespace: got(running, n, "serviceaccount", "default"))
            define(running)
            node(running, "plain", cpu="8")
            node(running, "with-gpu", cpu="32", gpus=2)
            yield running
    except NotHere as error:
        pytest.skip(str(error))


def eventually(ask):
    """The first true answer within two minutes."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.2)
    raise AssertionError("it did not happen within two minutes")


def applied(plane, values, *arguments):
    """Apply one object as administrator."""
    text = json.dumps({"apiVersion": "v1", **values})
    done = plane.kubectl("apply", "--server-side", "-f", "-", *arguments, text=text)
    assert done.returncode == 0, done.stderr


def got(plane, namespace, kind, name):
    """An object as the API server has it; None when it is not there."""
    done = plane.kubectl("get", kind, name, "-n", namespace, "-o", "json")
    return json.loads(done.stdout) if done.returncode == 0 else None


def node(plane, name, *, cpu, gpus=0):
    """A node that says it is ready; no kubelet stands behind it."""
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    applied(
        plane,
        {
            "kind": "Node",
            "metadata": {"name": name, "labels": {"pool": "gpu" if gpus else "plain"}},
            "spec": {"taints": [taint] if gpus else []},
        },
    )
    amounts = {"cpu": cpu, "memory": "256Gi", "pods": "100"}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "test"}
    status = {"status": {"capacity": amounts, "allocatable": amounts, "conditions": [ready]}}
    done = plane.kubectl(
        *("patch", "node", name, "--subresource=status", "--type=merge", "-p", json.dumps(status))
    )
    assert done.returncode == 0, done.stderr
    # a new node is tainted until the controller that is switched off here has seen it ready
    taints = json.dumps({"spec": {"taints": [taint] if gpus else []}})
    done = plane.kubectl("patch", "node", name, "--type=merge", "-p", taints)
    assert done.returncode == 0, done.stderr
