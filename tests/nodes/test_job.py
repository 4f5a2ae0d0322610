"""The job that a launching step makes, without a cluster."""

import pytest

from dpo.config.nodes import NodesConfig, NodesOptions
from dpo.nodes.job import build
from dpo.nodes.request import Request

REQUEST = Request("sft", "{}", "", {}, "s3://bucket/out", "", 300)


def pods(kind, labels):
    """What the job says of the metadata of its pods."""
    config = NodesConfig(options=NodesOptions(count=2, kind=kind), image="i:1", labels=labels)
    spec = build(config, REQUEST, "team", None)["spec"]
    if kind == "PyTorchJob":
        return [one["template"]["metadata"] for one in spec["pytorchReplicaSpecs"].values()]
    (patch,) = spec["runtimePatches"]
    jobs = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    return [one["template"]["spec"]["template"]["metadata"] for one in jobs]


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
    for metadata in pods(kind, given):
        assert metadata["labels"] == {**given, "sidecar.istio.io/inject": expected}
