"""Settings of a deployment given by ``--deploy``: keys with dots, variables of two sources."""

import pytest

from dpo.errors import ConfigError
from pipelines.deployment import load_deployment


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        (
            "train.node_selector.cloud.google.com/gke-accelerator=nvidia-l4",
            lambda found: found.train.node_selector,
            {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        ),
        (
            "steps.sft.node_selector.kubernetes.io/arch=amd64",
            lambda found: found.resources("sft").node_selector,
            {"kubernetes.io/arch": "amd64"},
        ),
        (
            "labels.app.kubernetes.io/part-of=tuning",
            lambda found: found.labels,
            {"app.kubernetes.io/part-of": "tuning"},
        ),
        ("environment.a.b=c", lambda found: found.environment, {"a.b": "c"}),
    ],
)
def test_names_with_dots_are_one_key(assignment, read, expected):
    """Most labels of nodes have a domain; each of its parts was taken for a key of its own."""
    assert read(load_deployment("cpu", [assignment])) == expected


def test_a_key_of_a_secret_may_have_dots():
    found = load_deployment("cpu", ["store_secret.name=s", "store_secret.keys.key.id=A"])
    assert found.store_secret is not None
    assert found.store_secret.keys == {"key.id": "A"}


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (
            ["store_secret.keys.endpoint=S3_ENDPOINT", "environment.S3_ENDPOINT=http://minio:9000"],
            "the variable S3_ENDPOINT is set by environment and by store_secret.keys",
        ),
        (
            ["store_secret.keys.first=MINIO_ACCESS_KEY"],
            "two keys of the Secret in store_secret.keys set the variable MINIO_ACCESS_KEY",
        ),
    ],
)
def test_a_variable_has_one_source(assignments, said):
    """The first pod would be refused: value and valueFrom in one entry."""
    with pytest.raises(ConfigError, match=said):
        load_deployment("standalone", assignments)
