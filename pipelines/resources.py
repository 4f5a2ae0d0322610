"""What the pod of a step asks for: amounts, GPUs, place, queue, attempts.

Patterns are those of the API server: what it would refuse at the first pod is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dpo.config.base import Section
from dpo.config.nodes import ShortName
from pipelines.amounts import Cpu, Memory, below

_DOMAIN, _WORD = (
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
    r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?",
)
LabelKey = Annotated[str, Field(pattern=rf"^({_DOMAIN}/)?{_WORD}$")]
"""Key of a label or taint: up to 63 letters, digits and ``-_.``, with a domain in front or none."""
LabelValue = Annotated[str, Field(pattern=rf"^({_WORD})?$")]
"""Value of a label or taint."""

_EXTENDED = re.compile(rf"{_DOMAIN}/{_WORD}")
_INTEGER = re.compile(r"-?[0-9]+")
_VALUES = {
    **dict.fromkeys(("In", "NotIn"), "one or more"),
    **dict.fromkeys(("Exists", "DoesNotExist"), "none"),
    **dict.fromkeys(("Gt", "Lt"), "one integer"),
}
_WEEK_SECONDS = 7 * 24 * 3600


class Toleration(Section):
    """A taint that the pod accepts."""

    key: Literal[""] | LabelKey
    """Key of the taint; empty with Exists accepts every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists accepts any value. Left out it is Equal where a value is given."""
    value: LabelValue = ""
    """Value of the taint, for Equal."""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    """Effect of the taint; empty accepts all."""

    @model_validator(mode="before")
    @classmethod
    def _as_kubernetes(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("value") and "operator" not in values:
            return {**values, "operator": "Equal"}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Toleration:
        if self.operator == "Exists" and self.value:
            raise ValueError(
                f"the toleration of {self.key!r} has operator Exists, which accepts any value, and "
                f"the value {self.value!r}: write operator Equal, or leave the value out"
            )
        if self.operator == "Equal" and not self.key:
            raise ValueError(
                "a toleration without a key accepts every taint: its operator is Exists"
            )
        return self


class NodeRequirement(Section):
    """A node label that must hold, one term of the required node affinity."""

    key: LabelKey
    """Label of the node."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    """How the label is compared."""
    values: list[str] = []
    """What it is compared with: one or more for In and NotIn, one integer for Gt and Lt."""

    @model_validator(mode="after")
    def _consistent(self) -> NodeRequirement:
        wanted = _VALUES[self.operator]
        good = {
            "none": not self.values,
            "one or more": bool(self.values),
            "one integer": len(self.values) == 1 and _INTEGER.fullmatch(self.values[0]) is not None,
        }
        if not good[wanted]:
            raise ValueError(
                f"the affinity to {self.key} with operator {self.operator} takes {wanted} as "
                f"values, not {self.values}"
            )
        return self


class Resources(Section):
    """What the pod of a step asks for, where it may run and how often it is tried."""

    cpu: Cpu = "1"
    """CPU request, in cores."""
    cpu_limit: Cpu | None = None
    """CPU limit, in cores; none by default, because throttling slows more than it protects."""
    memory: Memory = "2Gi"
    """Memory request and, unless ``memory_limit`` says otherwise, limit."""
    memory_limit: Memory | None = None
    """Memory limit, where it is to differ from the request."""
    gpus: int = Field(0, ge=0, le=16)
    """GPUs of the pod; 0 asks for none."""
    gpu_resource: str = "nvidia.com/gpu"
    """Resource name under which the nodes offer their GPUs."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU: a run that cannot fit is refused before a GPU is booked."""
    shared_memory: Memory | None = None
    """Size of ``/dev/shm`` in memory; counts towards the memory limit."""
    node_selector: dict[LabelKey, LabelValue] = {}
    """Labels that the node must have."""
    affinity: list[NodeRequirement] = []
    """Further requirements on the node, all of which must hold."""
    tolerations: list[Toleration] = []
    """Taints that the pod accepts."""
    queue: ShortName | None = None
    """Kueue queue that admits the pod."""
    queue_priority: ShortName | None = None
    """Kueue workload priority class."""
    timeout_seconds: int = Field(0, ge=0)
    """The pod is ended when it takes longer; 0 sets no limit. Of a training over several nodes it
    is the job that is ended, and the time in which its queue holds it back does not count."""
    retries: int = Field(0, ge=0, le=50)
    """Further attempts after a failure, also of a pod that its node evicted. A deleted pod is tried
    again only where Kubernetes told of its end before it was gone."""
    retry_wait_seconds: int = Field(60, ge=0)
    """Wait before the second attempt; doubles with each attempt."""
    retry_until_seconds: int = Field(_WEEK_SECONDS, ge=1)
    """No attempt begins later than this after the first began, and a further attempt that runs then
    is ended: must exceed the training time with all waits, those in a queue too."""

    @model_validator(mode="after")
    def _consistent(self) -> Resources:
        if self.gpus and not _EXTENDED.fullmatch(self.gpu_resource):
            raise ValueError(
                f"gpu_resource={self.gpu_resource!r} is no resource that nodes could offer GPUs "
                "under: write it with its domain, as nvidia.com/gpu or amd.com/gpu"
            )
        for name, limit, request in (
            ("cpu", self.cpu_limit, self.cpu),
            ("memory", self.memory_limit, self.memory),
        ):
            if limit and below(limit, request):
                raise ValueError(
                    f"{name}_limit={limit} is less than the request {name}={request}: no pod is "
                    "made with these"
                )
        if self.queue_priority and not self.queue:
            raise ValueError("queue_priority is set without queue: name the Kueue queue as well")
        if self.retries and self.timeout_seconds >= self.retry_until_seconds:
            raise ValueError(
                f"retry_until_seconds={self.retry_until_seconds} is not longer than one attempt "
                f"may take (timeout_seconds={self.timeout_seconds}): no retry would ever begin"
            )
        return self
