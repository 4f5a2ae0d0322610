"""What is the matter with a job's pods, in words of its user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo.errors import TrainingStopped

Severity = Literal["waiting", "image", "failed"]
_IMAGE_REASONS = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError"}


@dataclass(frozen=True)
class Finding:
    """One thing that keeps a job from going on."""

    severity: Severity
    """waiting: may pass; image: seldom passes; failed: the pod has ended."""
    found: str
    """What, with the node's number."""
    fix: str
    """What to do about it."""
    pod: str = ""
    """Whose log tells more."""
    stopped: bool = False
    """The pod was asked to end and wrote a checkpoint."""


def diagnose(pods: Sequence[Any]) -> Finding | None:
    """The worst of what the pods show, or None: they run, or have not been looked at yet."""
    findings = [finding for number, pod in enumerate(pods) if (finding := _of_pod(pod, number))]
    order: list[Severity] = ["failed", "image", "waiting"]
    # the first to fail is the cause; the others end because it is gone
    findings.sort(key=lambda finding: (order.index(finding.severity), finding.stopped))
    return findings[0] if findings else None


def _of_pod(pod: Any, number: int) -> Finding | None:
    name, status = f"node {number} ({pod.metadata.name})", pod.status
    for container in status.container_statuses or ():
        state = container.state
        # a runtime may restart containers in place: without the other nodes that leads nowhere
        end = state.terminated or (container.last_state and container.last_state.terminated)
        if end and end.exit_code:
            return _ended(name, pod, end)
        if state.waiting and state.waiting.reason in _IMAGE_REASONS:
            return Finding(
                "image",
                f"the image of {name} cannot be pulled: {state.waiting.message or container.image}",
                "look at the name in the deployment's images.train and at image_pull_secrets",
            )
        if state.waiting and state.waiting.reason in _CONFIG_REASONS:
            return Finding(
                "image",
                f"the container of {name} cannot be made: {state.waiting.message}",
                "make the missing Secret or volume, or correct its name in the deployment",
            )
    if status.phase == "Failed":
        # evicted, or its node is gone: no container is left to say more
        why = ": ".join(filter(None, (status.reason, status.message))) or "its node is gone"
        return Finding(
            "failed", f"{name} was ended: {why}", "run again: it goes on from its checkpoint"
        )
    for condition in status.conditions or ():
        if condition.type == "PodScheduled" and condition.reason == "Unschedulable":
            return Finding(
                "waiting",
                f"no node can take {name}: {condition.message}",
                "ask for fewer nodes or GPUs (nodes.count, train.gpus), correct node_selector and "
                "tolerations, or wait until GPUs are free",
            )
    return None


def _ended(name: str, pod: Any, end: Any) -> Finding:
    if end.reason == "OOMKilled":
        limit = (pod.spec.containers[0].resources.limits or {}).get("memory", "none")
        return Finding(
            "failed",
            f"{name} ran out of memory (limit {limit})",
            "raise train.memory in the deployment, or lower micro_batch_tokens",
            pod.metadata.name,
        )
    if end.exit_code == TrainingStopped.exit_code:
        return Finding(
            "failed",
            f"{name} was told to end: its pod was deleted, or its machine drained "
            f"(exit code {end.exit_code})",
            "run again; its last lines, above, say from where it goes on",
            pod.metadata.name,
            stopped=True,
        )
    return Finding(
        "failed",
        f"{name} ended with exit code {end.exit_code}",
        "its last lines stand above",
        pod.metadata.name,
    )
