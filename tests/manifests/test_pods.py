"""Pods with the compiled pipeline's settings on a real API server with a real scheduler.

The pod is put together as Kubeflow's driver does it, from the executor's container and the
Kubernetes part of the package.
"""

import pytest

from pipelines import events, package
from pipelines.deployment import load_deployment
from pipelines.events import advice
from tests.manifests.conftest import applied, eventually, got

pytestmark = pytest.mark.kubernetes

IMAGES = ["images.data=registry.test/data:1", "images.train=registry.test/train:1"]


def pod(step, *assignments, deployment="gpu"):
    """The pod of a step, as far as the package determines it."""
    documents = package.deployed_package(load_deployment(deployment, [*IMAGES, *assignments]))
    name = f"exec-{step}"
    container = documents[0]["deploymentSpec"]["executors"][name]["container"]
    settings = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]
    volumes = [
        {"name": m["volumeName"], "emptyDir": {"medium": m["medium"], "sizeLimit": m["sizeLimit"]}}
        for m in settings.get("emptyDirMounts", [])
    ]
    mounts = [
        {"name": m["volumeName"], "mountPath": m["mountPath"]}
        for m in settings.get("emptyDirMounts", [])
    ]
    spec = {
        "containers": [
            {
                "name": "main",
                "image": container["image"],
                "imagePullPolicy": settings["imagePullPolicy"],
                "command": container["command"],
                "resources": resources(container["resources"]),
                "securityContext": settings["securityContext"],
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
        "restartPolicy": "Never",
        "nodeSelector": settings.get("nodeSelector", {}).get("labels", {}),
        "tolerations": settings.get("tolerations", []),
    }
    if deadline := settings.get("activeDeadlineSeconds"):
        spec["activeDeadlineSeconds"] = int(deadline)
    if terms := settings.get("nodeAffinity"):
        required = {"nodeSelectorTerms": terms}
        spec["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}
        }
    return spec


def resources(asked):
    requests = {"cpu": asked["resourceCpuRequest"], "memory": asked["resourceMemoryRequest"]}
    limits = {"memory": asked["resourceMemoryLimit"]}
    if accelerator := asked.get("accelerator"):
        limits[accelerator["resourceType"]] = accelerator["resourceCount"]
    return {"requests": requests, "limits": limits}


@pytest.fixture
def scheduled(plane, request):
    """Creates a pod; waits for its node, or for the scheduler's reason to wait."""
    made = []

    def create(spec):
        name = f"{request.node.name[:30].lower().replace('_', '-').rstrip('-')}-{len(made)}"
        applied(
            plane,
            {"kind": "Pod", "metadata": {"name": name, "namespace": "kubeflow"}, "spec": spec},
        )
        made.append(name)

        def outcome():
            found = got(plane, "kubeflow", "pod", name)
            if found["spec"].get("nodeName"):
                return found["spec"]["nodeName"]
            conditions = found.get("status", {}).get("conditions", [])
            return next((c["message"] for c in conditions if c.get("reason") == "Unschedulable"), 0)

        return eventually(outcome)

    yield create
    for name in made:
        plane.kubectl("delete", "pod", name, "-n", "kubeflow", "--force", "--grace-period=0")


@pytest.mark.parametrize("step", ["sft", "preference"])
def test_a_training_pod_is_admitted_and_goes_to_a_gpu_node(scheduled, step):
    assert scheduled(pod(step)) == "with-gpu"


def test_a_data_pod_stays_off_the_gpu_nodes(scheduled):
    assert scheduled(pod("ingest")) == "plain"


def test_without_gpus_a_training_pod_runs_anywhere_plain(scheduled):
    assert scheduled(pod("sft", deployment="cpu")) == "plain"


def test_more_gpus_than_there_are_waits_and_the_user_is_told_what_to_do(scheduled):
    message = scheduled(pod("sft", "train.gpus=4"))
    assert "Insufficient nvidia.com/gpu" in message
    (said,) = advice(message, "sft")
    assert "no node has that many free GPUs" in said


def test_who_waits_for_a_run_is_told_about_its_own_pods(plane, monkeypatch):
    """As submit.py --wait asks, with a kubeconfig; the pod is labelled as Argo labels them."""
    monkeypatch.setenv("KUBECONFIG", str(plane.kubeconfig))
    monkeypatch.setattr(events, "_ASK_SECONDS", 0.0)
    for run in ("mine", "other"):
        metadata = {
            "name": f"waiting-{run}",
            "namespace": "kubeflow",
            "labels": {"pipeline/runid": run},
            "annotations": {"workflows.argoproj.io/node-name": f"{run}.root.sft.executor"},
        }
        applied(plane, {"kind": "Pod", "metadata": metadata, "spec": pod("sft", "train.gpus=4")})
    watcher = events.Watcher("mine", "kubeflow")
    try:
        told = eventually(lambda: list(watcher.news()))
        assert watcher.reasons()["sft"][0] in told[0]
    finally:
        for run in ("mine", "other"):
            plane.kubectl("delete", "pod", f"waiting-{run}", "-n", "kubeflow", "--force")
    (line,) = told
    assert line.startswith("sft: waiting: ")
    assert "Insufficient nvidia.com/gpu" in line
    assert "--deploy train.gpus=" in line
    assert list(watcher.news()) == [], "each once"


def test_gpus_are_counted_over_pods(scheduled):
    assert scheduled(pod("sft", "train.gpus=2")) == "with-gpu"
    assert "Insufficient nvidia.com/gpu" in scheduled(pod("preference"))


def test_node_selector_and_affinity_choose_the_node(scheduled):
    assert scheduled(pod("ingest", "data.node_selector={pool: plain}")) == "plain"
    assert "didn't match" in scheduled(pod("ingest", "data.node_selector={pool: none}"))
    affinity = "data.affinity=[{key: pool, operator: In, values: [none]}]"
    assert "didn't match" in scheduled(pod("ingest", affinity))


def test_a_shared_memory_volume_is_in_memory(plane, scheduled, request):
    scheduled(pod("sft"))
    found = plane.kubectl(
        "get", "pods", "-n", "kubeflow", "-o", "jsonpath={.items[*].spec.volumes}"
    )
    assert '"medium":"Memory"' in found.stdout
    assert '"sizeLimit":"8Gi"' in found.stdout
