"""Runs as Argo and Kubeflow's API tell of them: a workflow's nodes, and the tasks made of these.

Names, states and fields are those of Kubeflow's sources (backend/src, KFP 2.17): ``NodeStatuses``
and ``RetrievePodName`` in common/util/workflow.go, ``toModelTask`` and ``toApiPipelineTaskDetail``
in apiserver/server/api_converter.go.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

WORKFLOW = "preference-fine-tuning-x7k2p"
DAG = f"{WORKFLOW}.root.exit-handler-1"
"""The node that the steps lie in."""
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_IMPL = "system-container-impl"
_PHASES = {
    "Pending": "PENDING",
    "Running": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Skipped": "SKIPPED",
    "Failed": "FAILED",
    "Omitted": "RUNTIME_STATE_UNSPECIFIED",
}


def node_id(path: str) -> str:
    """As Argo's ``Workflow.NodeID``: the workflow and FNV-1a (32 bits) of the node's whole name."""
    number = 2166136261
    for byte in path.encode():
        number = (number ^ byte) * 16777619 % 2**32
    return f"{WORKFLOW}-{number}"


def node(
    path: str,
    state: str,
    template: str = "",
    children: Iterable[str] = (),
    *,
    message: str = "",
    kind: str = "DAG",
    seconds: tuple[float, float | None] = (0, 0),
) -> dict[str, Any]:
    """A node of an Argo workflow.

    Args:
        path: Whole name, such as ``WORKFLOW.root.exit-handler-1.sft``.
        state: As the API calls its phase.
        template: What it was made of.
        children: Whole names of the nodes behind it.
        message: What Argo says of it.
        kind: Pod, DAG, Retry or Skipped.
        seconds: When it began and ended; None for one that goes on.
    """
    began, ended = seconds
    return {
        "id": node_id(path),
        "name": path,
        "displayName": path.rpartition(".")[2],
        "type": kind,
        "templateName": template,
        "phase": next(phase for phase, known in _PHASES.items() if known == state),
        "message": message,
        "startedAt": _at(began),
        "finishedAt": _at(ended),
        "children": [node_id(child) for child in children],
    }


def _at(seconds: float | None) -> str:
    if seconds is None:
        # what Go's zero time becomes
        return "0001-01-01T00:00:00Z"
    return (_EPOCH + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def task(
    name: str,
    state: str,
    *,
    message: str = "",
    within: str = DAG,
    seconds: tuple[float, float | None] = (0, 0),
) -> list[dict[str, Any]]:
    """What Argo has for one step: itself, its driver and its executor, which a cache hit skips."""
    path = f"{within}.{name}"
    driver, executor = f"{path}-driver", f"{path}.executor"
    whole = "SUCCEEDED" if state == "SKIPPED" else state
    begun = state != "RUNTIME_STATE_UNSPECIFIED"
    rows = [
        node(
            path,
            whole,
            "system-container-executor",
            [executor] if begun else [],
            seconds=seconds,
        ),
        node(driver, "SUCCEEDED" if begun else state, "system-container-driver", kind="Pod"),
    ]
    if begun:
        kind = "Skipped" if state == "SKIPPED" else "Pod"
        rows.append(node(executor, state, _IMPL, message=message, kind=kind, seconds=seconds))
    return rows


def pod(path: str, template: str = _IMPL) -> str:
    """Name of a node's pod, as ``RetrievePodName`` makes it.

    Args:
        path: Below the exit handler, such as ``sft.executor``.
        template: What the node was made of.
    """
    return _pod(node_id(f"{DAG}.{path}"), template)


def _pod(identity: str, template: str) -> str:
    return f"{WORKFLOW}-{template}-{identity.rpartition('-')[2]}"


def tasks_of(run_id: str, nodes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks that the API lists for these nodes (``toApiPipelineTaskDetail``).

    An identity of their own and the names of the nodes behind them: no pod and no message.
    """
    details = []
    known = {item["id"]: item for item in nodes}
    for item in sorted(known.values(), key=lambda one: str(one["id"])):
        tried = [known[child] for child in item["children"] if child in known]
        failed = [_pod(t["id"], t["templateName"]) for t in tried if t["phase"] == "Failed"]
        more = {"executor_detail": {"failed_main_jobs": failed}} if item["type"] == "Retry" else {}
        details.append(
            {
                "run_id": run_id,
                "task_id": str(uuid5(NAMESPACE_URL, run_id + item["id"])),
                "display_name": item["displayName"],
                "create_time": _at(0),
                "start_time": item["startedAt"],
                "end_time": item["finishedAt"],
                "state": _PHASES[item["phase"]],
                "execution_id": "0",
                "child_tasks": [{"pod_name": child} for child in item["children"]],
                **more,
            }
        )
    return details


def workflow_of(nodes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The Argo workflow with these nodes."""
    return {
        "kind": "Workflow",
        "metadata": {"name": WORKFLOW},
        "status": {"nodes": {item["id"]: item for item in nodes}},
    }
