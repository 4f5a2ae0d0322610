"""The job that a launching step makes, without a cluster."""

import pytest

from dpo.config.nodes import NodesConfig, NodesOptions
from dpo.nodes.job import build
from dpo.nodes.request import Request

REQUEST = Request("sft", "{}", "", {}, "s3://bucket/out", "", 300)


def pods(kind, **values):
    """Templates of the job's pods, of a TrainJob those laid over the runtime's; and its spec."""
    config = NodesConfig(options=NodesOptions(count=2, kind=kind), image="i:1", **values)
    spec = build(config, REQUEST, "team", None)["spec"]
    if kind == "PyTorchJob":
        return [one["template"] for one in spec["pytorchReplicaSpecs"].values()], spec
    (patch,) = spec["runtimePatches"]
    jobs = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return [one["template"]["spec"]["template"] for one in jobs], spec


@pytest.mark.parametrize("kind", ["TrainJob", "PyTorchJob"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "false"),
        ({"team": "x"}, "false"),
        ({"sidecar.istio.io/inject": "true"}, "true"),
    ],
)
def test_pods_get_no_proxy_of_istio_unless_somebody_says_so(kind, given, expected):
    """Profiles of Kubeflow have it for every pod; two nodes found no way to each other."""
    for pod in pods(kind, labels=given)[0]:
        assert pod["metadata"]["labels"] == {**given, "sidecar.istio.io/inject": expected}


@pytest.mark.parametrize("kind", ["TrainJob", "PyTorchJob"])
def test_nodes_have_the_volume_of_base_models(kind):
    """Without it a base model of the hub was fetched by every node, or not at all."""
    templates, spec = pods(kind, model_cache="models", model_cache_path="/keep")
    for pod in templates:
        (volume,) = [v for v in pod["spec"]["volumes"] if "persistentVolumeClaim" in v]
        assert volume["persistentVolumeClaim"] == {"claimName": "models"}
        (container,) = pod["spec"]["containers"]
        assert {"name": volume["name"], "mountPath": "/keep"} in container["volumeMounts"]
        # a TrainJob's variables stand beside the image
        known = container["env"] if kind == "PyTorchJob" else spec["trainer"]["env"]
        variables = {one["name"]: one.get("value") for one in known}
        assert variables["HF_HOME"] == "/keep/huggingface"
        assert variables["DPO_CACHE_DIR"] == "/keep/dpo"
    for pod in pods(kind)[0]:
        assert not any("persistentVolumeClaim" in v for v in pod["spec"]["volumes"])
