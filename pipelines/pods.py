"""A deployment's settings on the tasks of the pipeline, as compiled for a cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo.config.nodes import VARIABLE as NODES_VARIABLE
from dpo.config.nodes import NodeResources, NodesConfig, cache_variables
from dpo.storage.fingerprint import source_fingerprint
from pipelines.deployment import (
    CHECKPOINTED_STEPS,
    CHECKPOINTS_VARIABLE,
    DATA_STEPS,
    TRAIN_STEPS,
    Deployment,
)
from pipelines.resources import Resources
from pipelines.steps import DISPLAY_NAMES, step_of
from pipelines.sweep import compiled

_LAUNCHING_CPU, _LAUNCHING_MEMORY = "500m", "2Gi"
"""What a step asks for that only starts a job and follows it."""
_NOTIFYING = ("gate", "publish", "finish")
"""Steps that tell how a run ended: ``finish``, and the two before it for a run that was retried."""
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"


def deploy(tasks: Mapping[str, Any], deployment: Deployment) -> None:
    """Give each task of the pipeline (name to ``kfp.dsl.PipelineTask``) its settings.

    Tasks that are no step of ours (conditions) have none.
    """
    for name, task in tasks.items():
        # a sweep evaluates twice: evaluate-2; ingest may be shared: ingest-shard
        step = step_of(name)
        if step in (*DATA_STEPS, *TRAIN_STEPS):
            _deploy_step(task, step, deployment)
        if shown := _shown(name, task):
            task.set_display_name(shown)


def _shown(name: str, task: Any) -> str | None:
    """What the graph calls a task; one in a loop keeps its name, by which its outputs are found."""
    from kfp import dsl

    if isinstance(task.parent_task_group, dsl.ParallelFor):
        return None
    return DISPLAY_NAMES.get(name)


def _deploy_step(task: Any, step: str, deployment: Deployment) -> None:
    from kfp import kubernetes

    resources = deployment.resources(step)
    image = deployment.images.train if step in TRAIN_STEPS else deployment.images.data
    if image:
        task.set_container_image(image)
        # for the provenance of what it writes; the image is part of the cache's key already
        task.set_env_variable("DPO_IMAGE", image)
    _set_attempts(task, resources)
    if step in CHECKPOINTED_STEPS and deployment.nodes.count > 1:
        task.set_env_variable(NODES_VARIABLE, _nodes(deployment, resources).model_dump_json())
        resources = _launching()
    _set_timeout(task, resources)
    _set_amounts(task, resources)
    _set_place(task, resources)
    _set_pod(task, deployment, resources)
    for name, value in _own_variables(step, deployment).items():
        task.set_env_variable(name, value)
    if step in _NOTIFYING and (told := deployment.notification) and told.secret:
        kubernetes.use_secret_as_env(task, told.secret, {told.secret_key: "DPO_NOTIFY_SECRET"})
    if step == "publish" and (key := deployment.signing):
        kubernetes.use_secret_as_env(task, key.secret, {key.secret_key: "DPO_SIGNING_KEY"})


def _launching() -> Resources:
    """What the pod of a step needs that leaves the work to the pods of a job: no GPU, no queue.

    Nor a time limit, which is the job's: a queue may hold that back for hours, and a pod that is
    ended meanwhile leaves it to take its GPUs with nobody there.
    """
    return Resources(cpu=_LAUNCHING_CPU, memory=_LAUNCHING_MEMORY)


def _nodes(deployment: Deployment, resources: Resources) -> NodesConfig:
    """The job that a training step starts, with what its own pod would have got."""
    secret = deployment.store_secret
    tolerations = [
        {key: value for key, value in given.model_dump().items() if value}
        for given in resources.tolerations
    ]
    return NodesConfig(
        options=deployment.nodes,
        resources=NodeResources(
            **resources.model_dump(include={*NodeResources.model_fields} - {"tolerations"}),
            tolerations=tolerations,
        ),
        image=deployment.images.train,
        image_pull_policy=deployment.image_pull_policy,
        image_pull_secrets=deployment.image_pull_secrets,
        environment=deployment.environment,
        secret=secret.name if secret else None,
        secret_keys=secret.keys if secret else {},
        **_cache(deployment),
        labels=_pod_labels(deployment, resources),
        timeout_seconds=resources.timeout_seconds,
    )


def _cache(deployment: Deployment) -> dict[str, str]:
    cache = deployment.model_cache
    return {"model_cache": cache.claim, "model_cache_path": cache.mount_path} if cache else {}


def _own_variables(step: str, deployment: Deployment) -> dict[str, str]:
    """Variables of one step.

    Those of ``fingerprint``, ``gate``, ``publish`` and ``finish`` are free to change, for these
    steps are never cached.
    """
    if step == "fingerprint":
        machine = {
            name: {
                "nodes": deployment.nodes.count,
                "gpus": deployment.resources(name).gpus,
                "gpu_memory_gib": deployment.resources(name).gpu_memory_gib,
            }
            for name in CHECKPOINTED_STEPS
        }
        candidates = compiled().candidates
        return {
            **({"DPO_CANDIDATES": json.dumps(candidates)} if candidates else {}),
            "DPO_IMAGES": json.dumps(deployment.images.model_dump(), sort_keys=True),
            "DPO_EXPECTED_SOURCE": source_fingerprint(),
            "DPO_MACHINE": json.dumps(machine, sort_keys=True),
        }
    if step in _NOTIFYING and deployment.notification:
        return {"DPO_NOTIFY_URL": deployment.notification.url}
    if step in CHECKPOINTED_STEPS and deployment.checkpoint_root:
        return {CHECKPOINTS_VARIABLE: deployment.checkpoint_root}
    return {}


def booked(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """What a package books for its training steps, as its first step will be told."""
    executor = documents[0]["deploymentSpec"]["executors"]["exec-fingerprint"]
    variables = {item["name"]: item["value"] for item in executor["container"].get("env", [])}
    machine: dict[str, Any] = json.loads(variables.get("DPO_MACHINE", "{}"))
    return machine


def _set_amounts(task: Any, resources: Resources) -> None:
    from kfp import kubernetes

    task.set_cpu_request(resources.cpu).set_memory_request(resources.memory)
    task.set_memory_limit(resources.memory_limit or resources.memory)
    if resources.cpu_limit:
        task.set_cpu_limit(resources.cpu_limit)
    if resources.gpus:
        task.set_accelerator_type(resources.gpu_resource)
        task.set_accelerator_limit(resources.gpus)
    if resources.shared_memory:
        # 64 MB is a container's default: NCCL and DataLoader workers die of it with bus errors
        kubernetes.empty_dir_mount(
            task,
            "dshm",
            "/dev/shm",
            medium="Memory",
            size_limit=resources.shared_memory,  # nosec B108
        )


def _set_timeout(task: Any, resources: Resources) -> None:
    from kfp import kubernetes

    if resources.timeout_seconds:
        kubernetes.set_timeout(task, resources.timeout_seconds)


def _set_attempts(task: Any, resources: Resources) -> None:
    if resources.retries:
        task.set_retry(
            resources.retries,
            backoff_duration=f"{resources.retry_wait_seconds}s",
            backoff_factor=2.0,
            backoff_max_duration=f"{resources.retry_until_seconds}s",
        )


def _set_place(task: Any, resources: Resources) -> None:
    from kfp import kubernetes

    for key, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    if resources.affinity:
        terms = [term.model_dump() for term in resources.affinity]
        kubernetes.add_node_affinity(task, match_expressions=terms)
    for toleration in resources.tolerations:
        given = {key: value for key, value in toleration.model_dump().items() if value}
        kubernetes.add_toleration(task, **given)


def _set_pod(task: Any, deployment: Deployment, resources: Resources) -> None:
    from kfp import kubernetes

    kubernetes.set_image_pull_policy(task, deployment.image_pull_policy)
    if deployment.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, deployment.image_pull_secrets)
    if deployment.run_as_non_root:
        kubernetes.set_security_context(task, run_as_non_root=True)
    if secret := deployment.store_secret:
        kubernetes.use_secret_as_env(task, secret.name, secret.keys)
    for name, value in deployment.environment.items():
        task.set_env_variable(name, value)
    if cache := deployment.model_cache:
        kubernetes.mount_pvc(task, cache.claim, cache.mount_path)
        for name, value in cache_variables(cache.mount_path).items():
            task.set_env_variable(name, value)
    for name, value in _pod_labels(deployment, resources).items():
        kubernetes.add_pod_label(task, name, value)


def _pod_labels(deployment: Deployment, resources: Resources) -> dict[str, str]:
    labels = dict(deployment.labels)
    if resources.queue:
        labels[_QUEUE_LABEL] = resources.queue
    if resources.queue_priority:
        labels[_PRIORITY_LABEL] = resources.queue_priority
    return labels
