"""Training over several nodes: what a compiled package tells the step that starts the job.

It travels in an environment variable of the training steps, not as a pipeline parameter: other
nodes do not make another result, so they do not belong into a step's cache key.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from dpo.config.base import Section
from dpo.config.describe import validation_error

VARIABLE = "DPO_NODES"
"""Environment variable with a ``NodesConfig`` as JSON; absent: the step trains in its own pod."""

_PART = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_PARTS = rf"^{_PART}(\.{_PART})*$"
Name = Annotated[str, Field(pattern=_PARTS, max_length=253)]
"""Name of a Kubernetes object."""
ShortName = Annotated[str, Field(pattern=_PARTS, max_length=63)]
"""Name of an object that pods refer to by a label's value."""


class NodesOptions(Section):
    """How many nodes train, and by which operator."""

    count: int = Field(1, ge=1, le=256)
    """Nodes that train together; 1 trains in the step's own pod."""
    kind: Literal["TrainJob", "PyTorchJob"] = "TrainJob"
    """TrainJob of Kubeflow Trainer v2, or PyTorchJob of the training operator before it."""
    runtime: Name = "torch-distributed"
    """Training runtime that a TrainJob refers to."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """Whether that runtime is the cluster's or the namespace's."""
    service_account: Name | None = None
    """Account of the training pods; they need no right in Kubernetes."""
    start_timeout_seconds: int = Field(1800, ge=10)
    """The job is given up when its pods do not run after this time: no free GPUs, for example."""
    image_timeout_seconds: int = Field(180, ge=10)
    """The same for an image that cannot be pulled or a Secret that is not there."""
    lease_seconds: int = Field(300, ge=5)
    """The training pods end when the step that started them gave no sign for so long."""


class NodeResources(Section):
    """What each training pod asks for and where it may run."""

    cpu: str = "2"
    """CPU request, in cores."""
    cpu_limit: str | None = None
    """CPU limit, in cores."""
    memory: str = "8Gi"
    """Memory request."""
    memory_limit: str | None = None
    """Memory limit, where it differs from the request."""
    gpus: int = Field(0, ge=0)
    """GPUs of a node; one process each. 0 trains on its CPU in one process."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name under which nodes offer their GPUs."""
    shared_memory: str | None = None
    """Size of ``/dev/shm`` in memory."""
    node_selector: dict[str, str] = {}
    """Labels that the node must have."""
    affinity: list[dict[str, str | list[str]]] = []
    """Further requirements on the node: key, operator, values."""
    tolerations: list[dict[str, str]] = []
    """Taints that the pods accept."""


class NodesConfig(Section):
    """Everything that the launching step needs to make the job."""

    options: NodesOptions
    """How many nodes, and by which operator."""
    resources: NodeResources = NodeResources()
    """Of each training pod."""
    image: str
    """Image of the training pods: the step's own."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node asks the registry."""
    image_pull_secrets: list[Name] = []
    """Secrets with credentials of the registry."""
    environment: dict[str, str] = {}
    """Variables of the training pods; never a secret."""
    secret: Name | None = None
    """Secret with the store's credentials."""
    secret_keys: dict[str, str] = {}
    """Key of that Secret to name of the variable."""
    model_cache: Name | None = None
    """PersistentVolumeClaim with base models."""
    model_cache_path: str = "/cache"
    """Where it is mounted."""
    labels: dict[str, str] = {}
    """Labels of the job and of its pods, such as that of a Kueue queue."""
    timeout_seconds: int = Field(0, ge=0)
    """The job is ended when it takes longer; 0 sets no limit."""


def cache_variables(mount_path: str) -> dict[str, str]:
    """What lets a pod find base models in a volume that is mounted there, and keep them."""
    return {"DPO_CACHE_DIR": f"{mount_path}/dpo", "HF_HOME": f"{mount_path}/huggingface"}


def wanted_nodes() -> NodesConfig | None:
    """The job that the package asks this step to start, or None: it trains in its own pod.

    Raises:
        ConfigError: the variable holds no such settings: a package of another version.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        return NodesConfig.model_validate_json(text)
    except ValidationError as error:
        raise validation_error(error, NodesConfig, where=VARIABLE) from None
