"""What becomes of a training over several nodes, and what its user is told."""

import json
import time

import pytest
from kubernetes import client as k

from dpo.config.nodes import NodeResources, NodesConfig, NodesOptions
from dpo.errors import PipelineError, TrainingError, TrainingStopped
from dpo.nodes.cluster import Cluster
from dpo.nodes.request import Request
from dpo.storage.manifest import write_manifest
from dpo.storage.remote import send_output
from tests.manifests.conftest import applied, eventually, got
from tests.nodes.conftest import Launched, bound, ended, play

pytestmark = pytest.mark.kubernetes

GPUS = NodeResources(
    cpu="4",
    memory="16Gi",
    gpus=4,
    shared_memory="1Gi",
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
)


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


def test_a_job_is_created_scheduled_on_gpu_nodes_and_completed(
    plane, cluster, training, tmp_path, capfd
):
    expected = written(tmp_path, training)
    launched = Launched(cluster, config(), training)
    pods = bound(plane, training)
    assert {pod.spec.node_name for pod in pods} <= {"gpu-a", "gpu-b"}
    for pod in pods:
        assert pod.metadata.labels["sidecar.istio.io/inject"] == "false"
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


def test_why_pods_are_not_made_is_told_while_they_are_waited_for(
    plane, cluster, training, tmp_path, capfd
):
    quota = {"metadata": {"name": "small", "namespace": "team"}, "spec": {"hard": {"pods": "0"}}}
    applied(plane, {"kind": "ResourceQuota", **quota})
    launched = Launched(cluster, config(), training)
    try:
        told = ""

        def is_told():
            nonlocal told
            told += capfd.readouterr().err
            return "exceeded quota: small" in told

        eventually(is_told)
        assert "0 of 2 pods made: FailedCreate: " in told
    finally:
        plane.kubectl("delete", "resourcequota", "small", "-n", "team")
    expected = written(tmp_path, training)
    finish(plane, training)
    assert launched.result() == expected


def test_a_job_that_a_queue_holds_back_is_not_given_up(plane, cluster, training, tmp_path, capfd):
    """Kueue suspends jobs until there is room for them, which may take a day."""
    launched = Launched(cluster, config(start_timeout_seconds=10), training)
    bound(plane, training)
    suspended(plane, training, True)
    eventually(lambda: not cluster.pods(training.job_name))
    time.sleep(12)
    assert launched.outcome is None
    assert f"TrainJob {training.job_name} waits until its queue lets it" in capfd.readouterr().err
    expected = written(tmp_path, training)
    suspended(plane, training, False)
    finish(plane, training)
    assert launched.result() == expected


def suspended(plane, request, is_so):
    """As Kueue does it."""
    patch = json.dumps({"spec": {"suspend": is_so}})
    done = plane.kubectl(
        *("patch", "trainjob", request.job_name, "-n", "team", "--type=merge", "-p", patch)
    )
    assert done.returncode == 0, done.stderr


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


def test_a_job_whose_pods_ended_because_nobody_followed_is_made_anew(
    plane, cluster, training, tmp_path
):
    """They end well, for containers that fail are restarted; only their result is missing."""
    launched = Launched(cluster, config(), training)
    bound(plane, training)
    before = cluster.get(training.job_name)["metadata"]["uid"]
    finish(plane, training)
    error = launched.result()
    assert isinstance(error, TrainingStopped)
    assert "saw no sign of this step" in str(error)
    again = Launched(cluster, config(), training)
    eventually(
        lambda: (
            (cluster.get(training.job_name) or {}).get("metadata", {}).get("uid")
            not in (None, before)
        )
    )
    expected = written(tmp_path, training)
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


def test_a_quota_of_jobs_is_not_told_as_a_missing_role(plane, cluster, training):
    spec = {"hard": {"count/trainjobs.trainer.kubeflow.org": "0"}}
    quota = {"kind": "ResourceQuota", "metadata": {"name": "jobs", "namespace": "team"}}
    applied(plane, {**quota, "spec": spec})
    # it is enforced once its controller has counted
    eventually(lambda: got(plane, "team", "resourcequota", "jobs").get("status", {}).get("used"))
    error = Launched(cluster, config(), training).result()
    plane.kubectl("delete", "resourcequota", "jobs", "-n", "team")
    assert isinstance(error, PipelineError)
    assert "exceeded quota: jobs, requested: count/trainjobs" in str(error)
    assert "wait until other jobs end" in str(error)
    assert "dpo-training-launcher" not in str(error)


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
