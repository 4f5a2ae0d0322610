"""TrainJobs on a real API server, with Kubeflow Trainer's and JobSet's own controllers, a real
scheduler and GPU nodes that are objects only. The test plays the kubelet: it sets pods' states.
"""

import threading
import time
from contextlib import contextmanager, suppress

import pytest
from kubernetes import client as k

from dpo.nodes.cluster import Cluster
from dpo.nodes.run import train_on_nodes
from dpo.storage.processes import repeated
from tests.manifests.conftest import applied, eventually, got, node
from tests.support.kubernetes import running_control_plane
from tests.support.programs import NotHere
from tests.support.trainer import running_trainer


@contextmanager
def pods_removed(plane):
    """Removes the pods that were deleted, as the kubelet of their node would."""
    core = k.CoreV1Api(plane.client())

    def remove():
        for pod in core.list_namespaced_pod("team").items:
            if pod.metadata.deletion_timestamp:
                # one that was bound to no node is removed by the API server itself
                with suppress(k.ApiException):
                    core.delete_namespaced_pod(pod.metadata.name, "team", grace_period_seconds=0)

    with repeated(remove, 0.3, "kubelet"):
        yield


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    try:
        with running_control_plane(tmp_path_factory.mktemp("kubernetes")) as running:
            applied(running, {"kind": "Namespace", "metadata": {"name": "team"}})
            eventually(lambda: got(running, "team", "serviceaccount", "default"))
            restricted = "pod-security.kubernetes.io/enforce=restricted"
            running.kubectl("label", "namespace", "team", restricted)
            for name in ("gpu-a", "gpu-b"):
                node(running, name, cpu="32", gpus=8)
            node(running, "plain", cpu="32")
            with running_trainer(running), pods_removed(running):
                yield running
    except NotHere as error:
        pytest.skip(str(error))


@pytest.fixture
def cluster(plane):
    """No job of one test holds what the next one asks for."""
    yield Cluster("TrainJob", "team", plane.client())
    plane.kubectl("delete", "trainjobs,pytorchjobs,pods", "--all", "-n", "team", "--wait=false")


class Launched:
    """``train_on_nodes`` in a thread, as the launching pod runs it."""

    def __init__(self, cluster, wanted, request):
        self.outcome = None
        self._call = (wanted, request, cluster)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        wanted, request, cluster = self._call
        try:
            self.outcome = train_on_nodes(wanted, request, cluster=cluster, poll_seconds=0.3)
        except Exception as error:
            self.outcome = error

    def result(self):
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.outcome


def pods_of(plane, request, count=2):
    """The job's pods once Trainer, JobSet and Job controllers have made them all."""
    core = k.CoreV1Api(plane.client())
    label = f"jobset.sigs.k8s.io/jobset-name={request.job_name}"

    def ask():
        found = core.list_namespaced_pod("team", label_selector=label).items
        # those of an earlier attempt's job are on their way out
        found = [pod for pod in found if not pod.metadata.deletion_timestamp]
        return found if len(found) == count else None

    return sorted(eventually(ask), key=lambda pod: pod.metadata.name)


def bound(plane, request, count=2):
    """The pods once the scheduler has bound every one of them."""

    def ask():
        pods = pods_of(plane, request, count)
        return pods if all(pod.spec.node_name for pod in pods) else None

    return eventually(ask)


def play(plane, pod, phase, state=None):
    """Set a pod's state as its kubelet would."""
    status = {"phase": phase}
    if state:
        container = {"name": "node", "image": "i", "imageID": "", "ready": False}
        status["containerStatuses"] = [{**container, "restartCount": 0, "state": state}]
    core = k.CoreV1Api(plane.client())
    core.patch_namespaced_pod_status(pod.metadata.name, "team", {"status": status})


def ended(code, reason="Error"):
    """State of a container that ended with ``code``."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    end = {"exitCode": code, "reason": reason, "startedAt": now, "finishedAt": now}
    return {"terminated": end}
