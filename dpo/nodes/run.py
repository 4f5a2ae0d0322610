"""Training over several nodes, by the step that starts it: make the job, follow it, answer for it.

``train_on_nodes`` reads top to bottom. It can be killed at any moment: the next attempt finds the
job by its name and goes on following it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import ceil
from typing import Any, TypeVar

from dpo.config.nodes import NodesConfig
from dpo.errors import PipelineError, TrainingError, TrainingStopped
from dpo.nodes import lease
from dpo.nodes.cluster import Cluster, Unreachable
from dpo.nodes.diagnosis import Finding, diagnose
from dpo.nodes.job import build
from dpo.nodes.request import Request
from dpo.storage.manifest import MANIFEST, Manifest
from dpo.storage.progress import message
from dpo.storage.remote import read_remote_manifest
from dpo.storage.store import open_store

T = TypeVar("T")

_POLL_SECONDS = 3.0
_LAST_LINES = 40
_AWAY_SECONDS = 900.0
"""For which an API that does not answer is asked again: a control plane that is upgraded is away
for minutes, and the nodes train on."""
_AWAY_AT_START_SECONDS = 120.0
_EVENTS_AFTER_SECONDS = 5.0
"""After which the pods of a job are made, unless something is in the way."""
_EVENTS_SECONDS = 60.0


def train_on_nodes(
    config: NodesConfig,
    request: Request,
    *,
    cluster: Cluster | None = None,
    poll_seconds: float = _POLL_SECONDS,
) -> Manifest:
    """Train ``request`` on ``config.options.count`` nodes; returns the manifest of the result.

    Args:
        config: What the package asks for.
        request: The training; its output is written to the store by the job.
        cluster: Where; None takes the one that this pod runs in.
        poll_seconds: How often the job is looked at.

    Raises:
        ConfigError: a place that other nodes cannot reach, or no cluster.
        PipelineError: Kubernetes refuses the job, or its pods never ran.
        TrainingError: a pod ended before its work was done.
        TrainingStopped: the pods saw no sign of this step, and ended.
    """
    request.check()
    cluster = cluster or Cluster.here(config.options.kind)
    with lease.held(request.output, config.options.lease_seconds):
        _create_or_adopt(cluster, config, request)
        _Follower(cluster, config, request, poll_seconds).follow()
    lease.remove(request.output)
    if not _written(request):
        raise TrainingStopped(
            f"the nodes ended without a result: they saw no sign of this step for "
            f"{request.lease_seconds} s",
            where=request.output,
            fix="see that the nodes reach the store; run again: it goes on from its checkpoint",
        )
    return read_remote_manifest(request.output, stage=request.stage)


def _written(request: Request) -> bool:
    """Whether the result is in the store; nodes that nobody followed end well without one."""
    return open_store(request.output).stat(MANIFEST) is not None


def _create_or_adopt(cluster: Cluster, config: NodesConfig, request: Request) -> None:
    deadline = time.monotonic() + config.options.start_timeout_seconds
    look = partial(_is_there, cluster, config, request, deadline)
    while not _patiently(look, _AWAY_AT_START_SECONDS, pause=1):
        pass


def _patiently(
    ask: Callable[[], T], seconds: float, *, pause: float, away: Callable[[], None] = lambda: None
) -> T:
    """What is asked of Kubernetes, again for so many seconds while it does not answer."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except Unreachable:
            if time.monotonic() > give_up:
                raise
            away()
            time.sleep(pause)


def _is_there(cluster: Cluster, config: NodesConfig, request: Request, deadline: float) -> bool:
    """Make the job, or find it, or remove what is in its place: then this is to be asked again."""
    name, shown = request.job_name, f"{cluster.kind} {request.job_name}"
    found = cluster.get(name)
    if found is None and not cluster.pods(name):
        made = cluster.create(build(config, request, cluster.namespace, cluster.owner()))
        if made:
            message(request.stage, f"started {shown} on {config.options.count} nodes")
        return made
    if found is None or found["metadata"].get("deletionTimestamp"):
        _wait_until(deadline, f"{shown} of an earlier attempt is not removed")
    elif outcome_of(found) == "Failed":
        message(request.stage, f"removing {shown}, which failed in an earlier attempt")
        cluster.delete(name)
    elif outcome_of(found) and not _written(request):
        message(request.stage, f"removing {shown}, which ended when nobody followed it")
        cluster.delete(name)
    else:
        message(request.stage, f"going on with {shown}, which an earlier attempt started")
        return True
    return False


def _wait_until(deadline: float, found: str) -> None:
    if time.monotonic() > deadline:
        raise PipelineError(found, fix="remove it with kubectl, then run again")
    time.sleep(1)


def outcome_of(job: dict[str, Any]) -> str:
    """``Complete``, ``Failed`` or an empty text: it has not ended."""
    names = {"Complete": "Complete", "Succeeded": "Complete", "Failed": "Failed"}
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["status"] == "True" and condition["type"] in names:
            return names[condition["type"]]
    return ""


def is_suspended(job: dict[str, Any]) -> bool:
    """Whether a queue (Kueue) holds the job back: it has no pods, and is not to have any yet."""
    spec = job.get("spec", {})
    return bool(spec.get("suspend") or spec.get("runPolicy", {}).get("suspend"))


class _Follower:
    """Looks at a job until it ends; tells the user what changes, once."""

    def __init__(
        self, cluster: Cluster, config: NodesConfig, request: Request, poll_seconds: float
    ) -> None:
        self.cluster, self.config, self.request = cluster, config, request
        self.poll_seconds = poll_seconds
        self._told = ""
        self._since: dict[str, float] = {}
        self._log: threading.Thread | None = None
        self._last_line = time.monotonic()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """What is waited for is there: another wait has all of its time, and reasons of its own."""
        self._since.clear()
        self._events: list[str] = []
        self._next_events = _EVENTS_AFTER_SECONDS

    def follow(self) -> None:
        """Return when the job is complete; raise with the cause when it is not going to be."""
        name = self.request.job_name
        while True:
            job, pods = self._look(name)
            if job is None or job["metadata"].get("deletionTimestamp"):
                raise PipelineError(
                    f"the {self.cluster.kind} {name} was deleted while it ran",
                    where=f"namespace {self.cluster.namespace}",
                    fix="run again: training goes on from its last checkpoint",
                )
            outcome = outcome_of(job)
            if outcome == "Complete":
                self._finish_log()
                return
            if not outcome and is_suspended(job):
                # for hours, if need be; a queue that suspends it later ends its pods as well
                self._begin_anew()
                self._tell(f"the {self.cluster.kind} {name} waits until its queue lets it begin")
                time.sleep(self.poll_seconds)
                continue
            finding = diagnose(pods)
            if outcome == "Failed" or (finding and finding.severity == "failed"):
                self._fail(job, finding)
            self._watch_start(pods, finding)
            self._stream(pods)
            time.sleep(self.poll_seconds)

    def _look(self, name: str) -> tuple[dict[str, Any] | None, list[Any]]:
        """The job and its pods; where Kubernetes does not answer it is asked again."""
        return _patiently(
            lambda: (self.cluster.get(name), self.cluster.pods(name)),
            _AWAY_SECONDS,
            pause=self.poll_seconds,
            away=lambda: self._tell("the Kubernetes API does not answer; it is asked again"),
        )

    def _watch_start(self, pods: list[Any], finding: Finding | None) -> None:
        """Give up a job whose pods do not run in time, and free what it holds."""
        options, count = self.config.options, self.config.options.count
        running = sum(pod.status.phase in ("Running", "Succeeded") for pod in pods)
        if running == count:
            self._begin_anew()
            self._tell(f"all {count} nodes run")
            return
        severity = finding.severity if finding else "waiting"
        since = self._since.setdefault(severity, time.monotonic())
        self._tell(finding.found if finding else self._missing(pods, since))
        limit = options.image_timeout_seconds if severity == "image" else None
        limit = limit or options.start_timeout_seconds
        if time.monotonic() - since < limit:
            return
        found = finding.found if finding else self._missing(pods, since)
        self._remove()
        raise PipelineError(
            f"{found}; the job was given up after {limit} s",
            where=f"{self.cluster.kind} {self.request.job_name}",
            fix=finding.fix
            if finding
            else "look at its events (kubectl describe): a quota may be used up",
        )

    def _missing(self, pods: list[Any], since: float) -> str:
        """How many pods there are, and after some seconds why there are no more."""
        found = f"{len(pods)} of {self.config.options.count} pods made"
        waited = time.monotonic() - since
        if len(pods) < self.config.options.count and waited >= self._next_events:
            # they are those of the whole namespace: not asked for at each look
            self._next_events = waited + _EVENTS_SECONDS
            self._events = self.cluster.events(self.request.job_name)
        return f"{found}: {self._events[-1]}" if self._events else found

    def _fail(self, job: dict[str, Any], finding: Finding | None) -> None:
        self._finish_log()
        if finding and finding.pod:
            for line in self.cluster.log(finding.pod, lines=_LAST_LINES):
                print(line, flush=True)
        self._remove()
        where = f"{self.cluster.kind} {self.request.job_name}"
        if _took_too_long(job):
            # its pods were told to end, which is not what they failed of
            raise TrainingError(
                f"the nodes trained for longer than timeout_seconds={self.config.timeout_seconds}",
                where=where,
                fix="raise train.timeout_seconds in the deployment, and run again: training goes "
                "on from its last checkpoint",
            )
        if finding is None:
            raise TrainingError(
                f"the job failed: {_condition_message(job)}", where=where, fix="run again"
            )
        error = TrainingStopped if finding.stopped else TrainingError
        raise error(finding.found, where=where, fix=finding.fix)

    def _remove(self) -> None:
        """What the job failed of is what the user is told, also where it cannot be removed now."""
        with suppress(Unreachable):
            self.cluster.delete(self.request.job_name)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            message(self.request.stage, text)

    def _stream(self, pods: list[Any]) -> None:
        """Pass on the first node's log from the moment it runs; again where it broke off."""
        if not pods or pods[0].status.phase not in ("Running", "Succeeded"):
            return
        if self._log and (self._log.is_alive() or pods[0].status.phase == "Succeeded"):
            return
        first = pods[0].metadata.name
        # not from the last try: that one may have got no answer either
        since = max(1, ceil(time.monotonic() - self._last_line)) if self._log else None

        def copy() -> None:
            for line in self.cluster.log(first, follow=True, since_seconds=since):
                self._last_line = time.monotonic()
                print(line, flush=True)

        self._log = threading.Thread(target=copy, name="log", daemon=True)
        self._log.start()

    def _finish_log(self) -> None:
        if self._log:
            self._log.join(timeout=10)


def _failed_condition(job: dict[str, Any]) -> dict[str, Any]:
    conditions = job.get("status", {}).get("conditions", ())
    return next((found for found in conditions if found["type"] == "Failed"), {})


def _condition_message(job: dict[str, Any]) -> str:
    failed = _failed_condition(job)
    return failed.get("message") or failed.get("reason") or "no reason is given"


def _took_too_long(job: dict[str, Any]) -> bool:
    """Kubeflow Trainer names a reason of its own; the operator before it says so in the message."""
    failed = _failed_condition(job)
    return failed.get("reason") == "DeadlineExceeded" or failed.get("message", "").endswith(
        "longer than specified deadline"
    )
