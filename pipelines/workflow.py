"""The tasks of a run, linked: with names of their own, pods and what went wrong.

Kubeflow's API lists a run's tasks with names to show, states and times, and tells of each which
ones come behind it, by the names of the workflow's nodes. But it tells none of these names of the
tasks themselves, and no pod or message. The workflow, which its first version (``v1beta1``) hands
out of the same database, has all of it.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from pipelines.connection import ANSWER_SECONDS, pair
from pipelines.steps import TASKS, step_of

EXECUTOR = "executor"
"""What Kubeflow calls the task behind a step that runs the step's container."""
OMITTED = "RUNTIME_STATE_UNSPECIFIED"
"""What the API says of a step that is not begun because one before it failed (Argo's Omitted)."""
_STATES = {
    "Pending": "PENDING",
    "Running": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Skipped": "SKIPPED",
    "Failed": "FAILED",
    "Error": "FAILED",
}
_NOT_OFFERED = (404, 405, 501)
_AGAIN_SECONDS = 30.0
"""After so long the workflow is asked for although nothing seems to have changed: of one that Argo
packs, as of a sweep with many candidates, backends tell no news, or no tasks at all."""
_POD_NAMES = "workflows.argoproj.io/pod-name-format"
_TEMPLATE = "system-container-impl"
"""Of the pod of a step that has neither retries nor labels."""


def plain_name(task: Any) -> str:
    """Without the number of an attempt."""
    return re.sub(r"\(\d+\)$", "", task.display_name or "")


class Linker:
    """Links a run's tasks each time that it is asked for.

    Args:
        client: From ``pipelines.cluster.connect``.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._offered = True
        self._told: tuple[Any, ...] | None = None
        self._asked_at = -math.inf
        self._tasks: list[Any] = []

    def linked(self, run: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """The run with its tasks linked as well as the backend lets us in so many seconds."""
        details = getattr(run.run_details, "task_details", None) or []
        begun = run.state not in (None, "PENDING", OMITTED)
        if not (details or begun) or any(task.pod_name for task in details):
            return run
        states = sorted((task.display_name or "", task.state or "") for task in details)
        told = (run.state, states)
        old = time.monotonic() - self._asked_at > _AGAIN_SECONDS
        if (told != self._told or old) and (tasks := self._asked(run.run_id, seconds)):
            # a workflow is large: it is asked for again when something has changed; a run's end is
            # stored before the last states of its tasks
            self._told, self._tasks = told, tasks
        if told == self._told:
            run.run_details = _with_tasks(run.run_details, self._tasks)
        else:
            _link_by_times(details)
        return run

    def _asked(self, run_id: str, seconds: float) -> list[Any]:
        if not self._offered:
            return []
        self._asked_at = time.monotonic()
        try:
            found = self._client._run_api.api_client.call_api(
                f"/apis/v1beta1/runs/{quote(run_id)}",
                "GET",
                response_type="object",
                auth_settings=["Bearer"],
                _return_http_data_only=True,
                _request_timeout=pair(seconds),
            )
            return tasks_of(json.loads(found["pipeline_runtime"]["workflow_manifest"]))
        except Exception as error:
            # what is missing is told less well; the run itself is watched all the same
            self._offered = getattr(error, "status", None) not in _NOT_OFFERED
            return []


def _with_tasks(details: Any, tasks: list[Any]) -> Any:
    from kfp_server_api import V2beta1RunDetails

    details = details or V2beta1RunDetails()
    details.task_details = tasks
    return details


def tasks_of(workflow: Mapping[str, Any]) -> list[Any]:
    """The nodes of an Argo workflow, each as the API tells of a task."""
    from kfp_server_api import (
        GoogleRpcStatus,
        PipelineTaskDetailChildTask,
        V2beta1PipelineTaskDetail,
    )

    return [
        V2beta1PipelineTaskDetail(
            task_id=node["id"],
            pod_name=_pod_name(workflow["metadata"], node),
            display_name=node.get("displayName", ""),
            state=_STATES.get(node.get("phase", ""), OMITTED),
            error=GoogleRpcStatus(message=node.get("message")) if _works(node) else None,
            child_tasks=[
                PipelineTaskDetailChildTask(pod_name=name) for name in node.get("children") or []
            ],
        )
        for node in nodes_of(workflow).values()
    ]


def nodes_of(workflow: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By id; Argo packs those of a workflow that would be too large for Kubernetes' database."""
    status = workflow.get("status") or {}
    found: dict[str, dict[str, Any]] = status.get("nodes") or {}
    if not found and (packed := status.get("compressedNodes")):
        found = json.loads(gzip.decompress(base64.b64decode(packed)))
    return found


def _works(node: Mapping[str, Any]) -> bool:
    """Whether it does something itself; others say "child failed", or count attempts."""
    # later backends ask a service instead of a driver in a pod
    return node.get("type") in ("Pod", "HTTP", "Plugin")


def _pod_name(metadata: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """As Argo names the pod of a node."""
    name, identity = str(metadata["name"]), str(node["id"])
    if (metadata.get("annotations") or {}).get(_POD_NAMES) == "v1" or identity == name:
        return identity
    inline = ".inline" in node.get("name", "")
    return _named(identity, "" if inline else node.get("templateName", ""))


def _named(node: str, template: str) -> str:
    workflow, _, number = node.rpartition("-")
    return "-".join(filter(None, [workflow, template, number]))


def _link_by_times(details: Iterable[Any]) -> None:
    """Without the workflow: a step's executor begins and ends when the step does."""
    tasks = list(details)
    executors = [task for task in tasks if plain_name(task) == EXECUTOR]
    for step in sorted(tasks, key=_times):
        behind = [child.pod_name for child in step.child_tasks or [] if child.pod_name]
        if not behind or not executors or step_of(plain_name(step)) not in TASKS:
            continue
        # attempts are tasks of the same name: the first to begin is the one that they are behind
        nearest = min(executors, key=lambda task: (_apart(task, step), task.display_name))
        executors.remove(nearest)
        nearest.task_id = behind[0]
        nearest.pod_name = _pod_by_guess(nearest, behind[0])


def _pod_by_guess(executor: Any, node: str) -> str:
    failed = getattr(executor.executor_detail, "failed_main_jobs", None)
    return str(failed[-1]) if failed else _named(node, _TEMPLATE)


def _times(task: Any) -> tuple[float, float]:
    return _seconds(task.start_time), _seconds(task.end_time)


def _apart(one: Any, other: Any) -> float:
    return sum(abs(a - b) for a, b in zip(_times(one), _times(other), strict=True))


def _seconds(when: datetime | None) -> float:
    """Since 1970; 0 for what has not been yet, which the backend gives as the year 1."""
    if when is None or when.year < 1970:
        return 0.0
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
