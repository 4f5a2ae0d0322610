"""The few calls to Kubernetes that a launching step makes, and what its refusals mean.

Its account may create, read and delete jobs of one kind and read their pods and logs
(manifests/steps/launcher.yaml).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo.errors import ConfigError, PipelineError

Kind = Literal["TrainJob", "PyTorchJob"]
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_ANSWERS_WITHIN = (10, 60)
"""Seconds to connect and to read: a connection that is dead and not closed would be waited for."""
_CONNECTS_WITHIN = (10, None)
"""Of a log that is followed: it may say nothing for hours."""


_OF_A_RIGHT = re.compile(r'User "[^"]*" cannot |^403 ')
"""What an answer with 403 says where it is the account that may not, or where it says nothing."""


class Unreachable(PipelineError):
    """Kubernetes did not answer, or is not able to; it may be in a moment."""


@dataclass(frozen=True)
class Api:
    """Where a kind of job lives in the API, and how its pods are found."""

    group: str
    version: str
    plural: str
    pods: str
    """Label of the pods with the job's name."""
    operator: str
    """What to install when the API is missing."""


APIS: dict[Kind, Api] = {
    "TrainJob": Api(
        "trainer.kubeflow.org",
        "v1alpha1",
        "trainjobs",
        "jobset.sigs.k8s.io/jobset-name",
        "Kubeflow Trainer 2.2 or newer",
    ),
    "PyTorchJob": Api(
        "kubeflow.org",
        "v1",
        "pytorchjobs",
        "training.kubeflow.org/job-name",
        "the Kubeflow training operator 1.8 or newer",
    ),
}


class Cluster:
    """Jobs of one kind in one namespace."""

    def __init__(self, kind: Kind, namespace: str, client: Any = None) -> None:
        from kubernetes import client as k

        self.kind = kind
        self.api = APIS[kind]
        self.namespace = namespace
        self._core = k.CoreV1Api(client)
        self._objects = k.CustomObjectsApi(client)

    @classmethod
    def here(cls, kind: Kind) -> Cluster:
        """From inside a pod, else as kubectl would.

        Raises:
            ConfigError: there is no cluster to talk to.
        """
        from kubernetes import config

        try:
            config.load_incluster_config()
            namespace = (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        except (config.ConfigException, OSError):
            try:
                config.load_kube_config()
                _, active = config.list_kube_config_contexts()
                namespace = active["context"].get("namespace", "default")
            except (config.ConfigException, OSError):
                raise ConfigError(
                    "training over several nodes needs a Kubernetes cluster; none is configured",
                    where="nodes.count",
                    fix="submit to Kubeflow, or set nodes.count=1 to train in one process",
                ) from None
        return cls(kind, namespace)

    def owner(self) -> Any:
        """Owner reference of the pod that this runs in: its workflow; None outside of one."""
        name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
        from kubernetes.client import ApiException

        try:
            with self._reached(), suppress(ValueError):
                pod = self._core.read_namespaced_pod(
                    name, self.namespace, _request_timeout=_ANSWERS_WITHIN
                )
                return next(iter(pod.metadata.owner_references or ()), None)
        except ApiException:
            # no pod of that name here, or not for us to see
            return None
        return None

    def create(self, job: dict[str, Any]) -> bool:
        """Make the job; False where one of that name is there already.

        Raises:
            PipelineError: Kubernetes refuses it.
        """
        with self._translated("create"):
            self._objects.create_namespaced_custom_object(
                *self._place(), job, _request_timeout=_ANSWERS_WITHIN
            )
            return True
        return False

    def get(self, name: str) -> dict[str, Any] | None:
        """The job as it is now, or None: it was deleted."""
        with self._translated("get"):
            found: dict[str, Any] = self._objects.get_namespaced_custom_object(
                *self._place(), name, _request_timeout=_ANSWERS_WITHIN
            )
            return found
        return None

    def delete(self, name: str) -> None:
        """Remove the job, and its pods after it; nothing happens where there is none.

        Not in the foreground: Kubeflow Trainer 2.3 makes the JobSet of a job that is being deleted
        again and again, and the job never goes.
        """
        with self._translated("delete"):
            self._objects.delete_namespaced_custom_object(
                *self._place(),
                name,
                propagation_policy="Background",
                _request_timeout=_ANSWERS_WITHIN,
            )

    def pods(self, name: str) -> list[Any]:
        """The pods of a job, in the order of their nodes."""
        with self._translated("list pods of"):
            found = self._core.list_namespaced_pod(
                self.namespace,
                label_selector=f"{self.api.pods}={name}",
                _request_timeout=_ANSWERS_WITHIN,
            ).items
            return sorted(found, key=lambda pod: str(pod.metadata.name))
        return []

    def log(
        self,
        pod: str,
        *,
        follow: bool = False,
        lines: int | None = None,
        since_seconds: int | None = None,
    ) -> Iterator[str]:
        """Lines of a pod's log as they come; ends early where it cannot be read."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        with suppress(ApiException, HTTPError):
            answer = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                follow=follow,
                tail_lines=lines,
                since_seconds=since_seconds,
                _preload_content=False,
                _request_timeout=_CONNECTS_WITHIN if follow else _ANSWERS_WITHIN,
            )
            for line in answer:
                yield line.decode(errors="replace").rstrip("\n")

    def events(self, name: str) -> list[str]:
        """Warnings about objects whose names begin with the job's, the newest last; empty without
        that right."""
        from kubernetes.client import ApiException

        with suppress(ApiException, Unreachable), self._reached():
            found = self._core.list_namespaced_event(
                self.namespace, field_selector="type=Warning", _request_timeout=_ANSWERS_WITHIN
            )
            return [
                f"{event.reason}: {event.message}"
                # they are listed by name
                for event in sorted(found.items, key=_when)
                if (event.involved_object.name or "").startswith(name)
            ]
        return []

    def _place(self) -> tuple[str, str, str, str]:
        return self.api.group, self.api.version, self.namespace, self.api.plural

    @contextmanager
    def _translated(self, verb: str) -> Iterator[None]:
        """Refusals as messages; 409 and, for objects that exist no more, 404 pass in silence."""
        from kubernetes.client import ApiException

        try:
            with self._reached():
                yield
        except ApiException as error:
            # a job that is about to be made cannot be missing: its kind is
            missing_api = error.status == 404 and verb == "create"
            if error.status == 409 or (error.status == 404 and not missing_api):
                return
            raise self._refused(verb, error, missing_api=missing_api) from None

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """No answer, and answers of an API that cannot work just now, as ``Unreachable``."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        why: object
        try:
            yield
            return
        except ApiException as error:
            if error.status != 429 and error.status < 500:
                raise
            why = _reason(error)
        except HTTPError as error:
            why = error
        raise Unreachable(
            f"the Kubernetes API does not answer: {why}",
            fix="look whether the cluster is up; the running job is taken up by the next try",
        )

    def _refused(self, verb: str, error: Any, *, missing_api: bool) -> PipelineError:
        what = f"Kubernetes refused to {verb} the {self.kind}"
        where = f"namespace {self.namespace}"
        if missing_api:
            return PipelineError(
                f"the cluster has no {self.kind}",
                where=where,
                fix=f"install {self.api.operator}, or compile the package without --nodes",
            )
        reason = _reason(error)
        # a quota, or a webhook of the cluster's rules, answers with 403 as well
        if error.status == 401 or (error.status == 403 and _OF_A_RIGHT.search(reason)):
            return PipelineError(
                f"{what}: the account of the run may not ({error.status})",
                where=where,
                fix="bind the role dpo-training-launcher to it (manifests/steps/launcher.yaml)",
            )
        fix = "correct the deployment, submit again"
        if "exceeded quota" in reason:
            fix = "wait until other jobs end, or let the administrator raise the quota; run again"
        return PipelineError(f"{what}: {reason}", where=where, fix=fix)


def _when(event: Any) -> float:
    """Seconds since 1970 at which an event was last seen; reporters note it in different places."""
    when = event.last_timestamp or event.event_time or event.metadata.creation_timestamp
    return float(when.timestamp()) if when else 0.0


def _reason(error: Any) -> str:
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(error.body)["message"])
    return f"{error.status} {error.reason}"
