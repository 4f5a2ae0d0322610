"""TrainJobs on a real API server, with Kubeflow Trainer's and JobSet's own controllers, a real
scheduler and GPU nodes that are objects only. The test plays the kubelet: it sets pods' states.
"""

import json
import threading
import time
from contextlib import suppress

import pytest
from kubernetes import client as k

from dpo.config.nodes import NodeResources, NodesConfig, NodesOptions
from dpo.errors import PipelineError, TrainingError, TrainingStopped
from dpo.nodes.cluster import Cluster
from dpo.nodes.request import Request
from dpo.nodes.run import train_on_nodes
from dpo.storage.manifest import write_manifest
from dpo.storage.remote import send_output
from tests.manifests.conftest import applied, eventually, got, node
from tests.support.kubernetes import NoKubernetes, running_control_plane
from tests.support.trainer import running_trainer

pytestmark = pytest.mark.kubernetes

GPUS = NodeResources(
    cpu="4",
    memory="16Gi",
    gpus=4,
    shared_memory="1Gi",
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
)


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
            with running_trainer(running):
                yield running
    except NoKubernetes as error:
        pytest.skip(str(error))


@pytest.fixture
def cluster(plane):
    return Cluster("TrainJob", "team", plane.client())


@pytest.fixture(scope="module", autouse=True)
def _kubelet(plane):
    """Removes the pods that were deleted, as the kubelet of their node would."""
    core, ended = k.CoreV1Api(plane.client()), threading.Event()

    def remove():
        while not ended.wait(0.3):
            for pod in core.list_namespaced_pod("team").items:
                if pod.metadata.deletion_timestamp:
                    # one that was bound to no node is removed by the API server itself
                    with suppress(k.ApiException):
                        core.delete_namespaced_pod(
                            pod.metadata.name, "team", grace_period_seconds=0
                        )

    thread = threading.Thread(target=remove, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.fixture(autouse=True)
def _free_nodes(plane):
    """No job of one test holds the GPUs that the next one asks for."""
    yield
    plane.kubectl("delete", "trainjobs,pytorchjobs,pods", "--all", "-n", "team", "--wait=false")


@pytest.fixture
def training(tmp_path):
    """A request whose output is in a store of its own, so that its job has a name of its own."""
    store = tmp_path.as_uri()
    return Request(
        stage="sft",
        settings="{}",
        code="",
        inputs={"pairs": f"{store}/pairs"},
        output=f"{store}/checkpoint",
        checkpoints="",
        lease_seconds=30,
    )


def config(count=2, **options):
    return NodesConfig(
        options=NodesOptions(count=count, **options), resources=GPUS, image="registry.test/train:1"
    )


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


def finish(plane, request, count=2):
    """Every pod runs, then ends well, and the result is in the store."""
    pods = bound(plane, request, count)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for pod in pods:
        play(plane, pod, "Running", {"running": {"startedAt": now}})
    for pod in pods:
        end = {"exitCode": 0, "reason": "Completed", "startedAt": now, "finishedAt": now}
        play(plane, pod, "Succeeded", {"terminated": end})


def written(tmp_path, request):
    """What node 0 leaves in the store."""
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    manifest = write_manifest(folder, "sft")
    send_output(folder, request.output)
    return manifest


def ended(code, reason="Error"):
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    end = {"exitCode": code, "reason": reason, "startedAt": now, "finishedAt": now}
    return {"terminated": end}


def test_a_job_is_created_scheduled_on_gpu_nodes_and_completed(
    plane, cluster, training, tmp_path, capfd
):
    expected = written(tmp_path, training)
    launched = Launched(cluster, config(), training)
    pods = bound(plane, training)
    assert {pod.spec.node_name for pod in pods} <= {"gpu-a", "gpu-b"}
    for pod in pods:
        container = pod.spec.containers[0]
        assert container.image == "registry.test/train:1"
        assert container.command == ["python3", "-m", "dpo.train.node"]
        assert container.resources.limits["nvidia.com/gpu"] == "4"
        environment = {variable.name: variable.value for variable in container.env}
        assert environment["PET_NNODES"] == "2"
        assert environment["PET_MASTER_ADDR"].startswith(training.job_name)
        assert Request(**json.loads(environment["DPO_NODE_JOB"])) == training
        assert {mount.mount_path for mount in container.volume_mounts} >= {"/tmp", "/dev/shm"}
    finish(plane, training)
    assert launched.result() == expected
    told = capfd.readouterr().err
    assert f"started TrainJob {training.job_name} on 2 nodes" in told
    assert "all 2 nodes run" in told


def test_a_job_that_no_node_can_take_is_given_up(plane, cluster, training):
    wanted = config(start_timeout_seconds=10).model_copy(
        update={"resources": GPUS.model_copy(update={"gpus": 16})}
    )
    error = Launched(cluster, wanted, training).result()
    assert isinstance(error, PipelineError)
    assert "Insufficient nvidia.com/gpu" in str(error)
    assert "ask for fewer nodes or GPUs" in str(error)
    # what it held is free again
    eventually(lambda: cluster.get(training.job_name) is None)


def test_memory_that_runs_out_is_called_by_its_name(plane, cluster, training):
    launched = Launched(cluster, config(), training)
    play(plane, bound(plane, training)[1], "Failed", ended(137, "OOMKilled"))
    error = launched.result()
    assert isinstance(error, TrainingError)
    assert "node 1" in str(error)
    assert "ran out of memory (limit 16Gi)" in str(error)


def test_an_image_that_cannot_be_pulled_is_called_by_its_name(plane, cluster, training):
    launched = Launched(cluster, config(image_timeout_seconds=10), training)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "registry.test: not found"}}
    play(plane, bound(plane, training)[0], "Pending", waiting)
    error = launched.result()
    assert isinstance(error, PipelineError)
    assert "cannot be pulled: registry.test: not found" in str(error)


def test_a_node_that_saved_and_ended_may_be_tried_again(plane, cluster, training):
    launched = Launched(cluster, config(), training)
    play(plane, bound(plane, training)[0], "Failed", ended(75))
    assert isinstance(launched.result(), TrainingStopped)


def test_a_deleted_job_is_reported(plane, cluster, training):
    launched = Launched(cluster, config(), training)
    bound(plane, training)
    cluster.delete(training.job_name)
    error = launched.result()
    assert isinstance(error, PipelineError)
    assert "was deleted while it ran" in str(error)


def test_a_restarted_launcher_adopts_the_running_job(plane, cluster, training, tmp_path, capfd):
    """The first launcher is never asked again, as after SIGKILL; the second ends the step."""
    expected = written(tmp_path, training)
    Launched(cluster, config(), training)
    before = cluster.get(eventually(lambda: bound(plane, training)) and training.job_name)
    second = Launched(cluster, config(), training)
    time.sleep(1)
    finish(plane, training)
    assert second.result() == expected
    assert cluster.get(training.job_name)["metadata"]["uid"] == before["metadata"]["uid"]
    assert "which an earlier attempt started" in capfd.readouterr().err


def test_a_retry_after_a_failure_makes_a_new_job(plane, cluster, training, tmp_path):
    launched = Launched(cluster, config(), training)
    first = bound(plane, training)
    play(plane, first[0], "Failed", ended(1))
    assert isinstance(launched.result(), TrainingError)
    expected = written(tmp_path, training)
    again = Launched(cluster, config(), training)
    old = {pod.metadata.uid for pod in first}
    eventually(lambda: not old & {pod.metadata.uid for pod in cluster.pods(training.job_name)})
    finish(plane, training)
    assert again.result() == expected


def test_the_job_belongs_to_the_workflow(plane, cluster, training, monkeypatch):
    """The launching pod's owner is the job's owner, so deleting the run deletes the job."""
    core = k.CoreV1Api(plane.client())
    workflow = core.create_namespaced_config_map(
        "team", {"metadata": {"name": f"workflow-{training.job_name}"}}
    )
    reference = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": workflow.metadata.name,
        "uid": workflow.metadata.uid,
    }
    secure = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {"name": "main", "image": "i", "securityContext": secure}
    pod = core.create_namespaced_pod(
        "team",
        {
            "metadata": {"generateName": "launcher-", "ownerReferences": [reference]},
            "spec": {"containers": [container]},
        },
    )
    monkeypatch.setenv("KFP_POD_NAME", pod.metadata.name)
    launched = Launched(cluster, config(), training)
    bound(plane, training)
    owners = cluster.get(training.job_name)["metadata"]["ownerReferences"]
    assert [owner["uid"] for owner in owners] == [workflow.metadata.uid]
    core.delete_namespaced_config_map(workflow.metadata.name, "team")
    assert "was deleted while it ran" in str(launched.result())


def test_an_account_without_the_role_is_told_which(plane, training):
    applied(plane, {"kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": "team"}})
    token = plane.account_token("team", "nobody")
    error = Launched(Cluster("TrainJob", "team", plane.client(token)), config(), training).result()
    assert isinstance(error, PipelineError)
    assert "dpo-training-launcher" in str(error)


def test_a_pytorch_job_is_accepted_by_its_own_schema(plane, training):
    """The training operator is not run here: the object is made, nothing more."""
    cluster = Cluster("PyTorchJob", "team", plane.client())
    launched = Launched(cluster, config(kind="PyTorchJob"), training)
    job = eventually(lambda: cluster.get(training.job_name))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 1)
    cluster.delete(training.job_name)
    assert "was deleted while it ran" in str(launched.result())


def test_a_cluster_without_the_operator_says_what_to_install(plane, training):
    cluster = Cluster("TrainJob", "team", plane.client())
    object.__setattr__(cluster, "api", cluster.api.__class__("none.test", "v1", "x", "y", "Z 1"))
    error = Launched(cluster, config(), training).result()
    assert isinstance(error, PipelineError)
    assert "install Z 1" in str(error)
