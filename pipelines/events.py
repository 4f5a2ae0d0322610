"""What Kubernetes says of a run's pods, and what it means for the person who started the run.

Kubeflow's API is silent about a pod that cannot start: a missing Secret, an image that cannot be
pulled or a cluster without free GPUs leave the run pending for ever. Where the caller may read the
cluster (a kubeconfig, or a service account in it), its pods and its workflow are asked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.steps import TASKS
from pipelines.steps import step_of as task_step
from pipelines.workflow import nodes_of

_ASK_SECONDS = 15.0
_ANSWER_SECONDS = 10.0
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_RUN_LABEL = "pipeline/runid"
_NODE_NAME = "workflows.argoproj.io/node-name"
_STARTING = {"", "ContainerCreating", "PodInitializing"}
_REASONS = (
    (
        r"OOMKilled",
        "the step ran out of memory: give it more (--deploy steps.STEP.memory=...) or use a "
        "smaller batch",
    ),
    (
        r"secret \"?(\S+?)\"? not found|couldn't find key",
        "a Secret that the deployment names is missing in the run's namespace, or lacks a key: "
        "create it; store_secret names it and its keys",
    ),
    (
        r"exceeded quota",
        "the namespace's quota is used up: ask for less (--deploy), or wait until other runs end",
    ),
    (
        r"ErrImagePull|ImagePullBackOff|ErrImageNeverPull|InvalidImageName|ImageInspectError",
        "the image cannot be pulled: check its name (--image) and image_pull_secrets of the "
        "deployment",
    ),
    (
        r"Insufficient (\S+\.com/\S*gpu\S*)|Insufficient \S+/\S+",
        "no node has that many free GPUs: ask for fewer (--deploy train.gpus=...; 0 trains on the "
        "CPU), wait for a free node, or check gpu_resource",
    ),
    (
        r"Insufficient (\S+)",
        "no node has what the step asks for: ask for less (--deploy steps.STEP.cpu=500m, "
        "steps.STEP.memory=3Gi), or wait for a free node",
    ),
    (
        r"didn't match Pod's node affinity|untolerated taint",
        "no node fits node_selector, affinity and tolerations of the deployment: correct them",
    ),
    (
        r"persistentvolumeclaim \"?(\S+?)\"? not found|unbound immediate PersistentVolumeClaims",
        "the claim that model_cache names is missing in the run's namespace, or has no volume: "
        "create it, or see why it has none (kubectl describe pvc)",
    ),
    (
        r"cannot import name '\w+' from 'dpo\.|No module named 'dpo\.",
        "the image was built from other code than the pipeline that runs in it: build images and "
        "pipeline from one commit (`make images-push`, `make pipeline`)",
    ),
    (
        r"DeadlineExceeded",
        "the step took longer than its timeout_seconds: raise it in the deployment",
    ),
    (
        # not the scheduler's "preemption: ...", which ends every message about a pod without a node
        r"pod deleted|Evicted|[Pp]reempt(ed|ing)|node shutdown"
        r"|exit (code|status) (130|137|143)\b",
        "the pod was taken away or its process killed: `submit.py --retry RUN_ID` goes on, "
        "training from its last checkpoint where the deployment names a place for them; if it "
        "comes again, it ran out of memory (--deploy steps.STEP.memory=...)",
    ),
)
"""Words of Kubernetes, and of Python in an image of other code, and what they mean for the person
who started the run; the first one wins."""


def advice(text: str, step: str, run_id: str = "RUN_ID") -> list[str]:
    """A line that says what to do, where the text is one that is known here."""
    found = [fix for pattern, fix in _REASONS if re.search(pattern, text)]
    return [f"  fix:   {fix.replace('STEP', step).replace('RUN_ID', run_id)}" for fix in found[:1]]


def step_of(node_name: str) -> str:
    """The step that a node of the workflow belongs to, by its dotted name; empty for none of ours.

    Such as ``run-x.root.exit-handler-1.sft(0).executor`` or ``...sft-driver``.
    """
    for part in reversed(node_name.split(".")):
        name = task_step(re.sub(r"\(.*\)$", "", part).removesuffix("-driver"))
        if name in TASKS:
            return name
    return ""


class Watcher:
    """Asks the cluster about one run, as far as the caller may; all silence otherwise."""

    def __init__(self, run_id: str, namespace: str | None) -> None:
        self._label = f"{_RUN_LABEL}={run_id}"
        self._namespace = namespace or _own_namespace()
        self._api: Any = None
        self._connected = False
        self._told: set[str] = set()
        self._asked = time.monotonic()

    def news(self) -> Iterator[str]:
        """Lines about pods that cannot start, each once; asks every 15 seconds at most."""
        if time.monotonic() - self._asked < _ASK_SECONDS:
            return
        self._asked = time.monotonic()
        for step, texts in self._pending().items():
            for text in texts:
                if (line := f"{step}: waiting: {text}") not in self._told:
                    self._told.add(line)
                    yield "\n".join([line, *advice(text, step)])

    def reasons(self) -> dict[str, list[str]]:
        """By step, what workflow and pods say of an end that was no success."""
        found: dict[str, list[str]] = {}
        for step, text in [*self._node_messages(), *self._pod_reasons()]:
            if text not in found.setdefault(step, []):
                found[step].append(text)
        return found

    # --- the cluster's answers ---

    def _client(self) -> Any:
        if not self._connected:
            self._connected = True
            self._api = _connect()
        return self._api

    def _pods(self) -> list[Any]:
        if (api := self._client()) is None:
            return []
        import kubernetes

        try:
            found = kubernetes.client.CoreV1Api(api).list_namespaced_pod(
                self._namespace, label_selector=self._label, _request_timeout=_ANSWER_SECONDS
            )
        except Exception:
            # no permission, or no way there: the run itself goes on and is watched
            self._api = None
            return []
        return list(found.items)

    def _pending(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for pod in self._pods():
            step = _step_of_pod(pod)
            if step and pod.status.phase == "Pending":
                found.setdefault(step, []).extend(_why_pending(pod))
        for step, text in self._node_messages(phase="Pending"):
            if text not in found.setdefault(step, []):
                found[step].append(text)
        return found

    def _pod_reasons(self) -> Iterator[tuple[str, str]]:
        for pod in self._pods():
            if not (step := _step_of_pod(pod)):
                continue
            if pod.status.phase == "Pending":
                for text in _why_pending(pod):
                    yield step, text
            elif pod.status.reason:
                yield step, ": ".join(filter(None, [pod.status.reason, pod.status.message]))
            for status in pod.status.container_statuses or []:
                ended = status.state.terminated
                if ended and ended.exit_code and ended.reason not in (None, "Error", "Completed"):
                    yield step, f"{ended.reason} (exit code {ended.exit_code})"

    def _node_messages(self, phase: str = "") -> Iterator[tuple[str, str]]:
        """Messages of the workflow's nodes: a pod that a quota refused exists nowhere else."""
        if (api := self._client()) is None:
            return
        import kubernetes

        try:
            found = kubernetes.client.CustomObjectsApi(api).list_namespaced_custom_object(
                "argoproj.io",
                "v1alpha1",
                self._namespace,
                "workflows",
                label_selector=self._label,
                _request_timeout=_ANSWER_SECONDS,
            )
        except Exception:
            # as above; a cluster may also hide its workflows and show its pods
            return
        for workflow in found.get("items", []):
            yield from _messages(nodes_of(workflow), phase)


def _messages(nodes: Mapping[str, Any], phase: str) -> Iterator[tuple[str, str]]:
    for node in nodes.values():
        wanted = node.get("phase") == phase if phase else node.get("phase") in ("Failed", "Error")
        text, step = node.get("message", ""), step_of(node.get("name", ""))
        if wanted and text and step and node.get("type") == "Pod":
            yield step, text


def _why_pending(pod: Any) -> Iterator[str]:
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False" and condition.message:
            yield condition.message
    statuses = [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
    for status in statuses:
        waiting = status.state.waiting if status.state else None
        if waiting and (waiting.reason or "") not in _STARTING:
            yield ": ".join(filter(None, [waiting.reason, waiting.message]))


def _step_of_pod(pod: Any) -> str:
    return step_of((pod.metadata.annotations or {}).get(_NODE_NAME, ""))


def _own_namespace() -> str:
    if _SERVICE_ACCOUNT.is_file():
        return _SERVICE_ACCOUNT.read_text(encoding="utf-8").strip()
    return "kubeflow"


def _connect() -> Any:
    """A client of the cluster; None where nothing says how to reach one."""
    import kubernetes

    configuration = kubernetes.client.Configuration()
    files = os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())
    try:
        # not load_config(), which prints where it looks
        if any(Path(file).is_file() for file in files.split(os.pathsep)):
            kubernetes.config.load_kube_config(files, client_configuration=configuration)
        else:
            kubernetes.config.load_incluster_config(client_configuration=configuration)
    except Exception:
        # also a file that is no configuration: what it would tell is only beside the run
        return None
    # a cluster that is not there must not hold up the run
    configuration.retries = False
    return kubernetes.client.ApiClient(configuration)
