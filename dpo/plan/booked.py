"""The plan against the GPUs that a deployment books, inside the first step of a run.

A run that was started in Kubeflow's form passes no ``submit.py``, so what the deployment books for
each training step travels with the package (``DPO_MACHINE``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from dpo.config.parameters import stage_configs
from dpo.config.stages import Stage
from dpo.plan.estimate import Machine
from dpo.plan.preflight import check_fit

VARIABLE = "DPO_MACHINE"
"""JSON: for ``sft`` and ``preference`` the number of GPUs and the memory of one, in GiB."""
_STAGES: tuple[Stage, ...] = ("sft", "preference")


def check_booked(parameters: Mapping[str, Any], booked: Mapping[str, Any] | None = None) -> None:
    """Refuse a run whose training cannot fit the GPUs that its deployment books.

    Args:
        parameters: Pipeline parameters by name.
        booked: By stage ``gpus`` and ``gpu_memory_gib``; None reads ``DPO_MACHINE``. A stage
            without GPUs, or whose GPUs' memory nobody said, is not checked.

    Raises:
        ConfigError: it cannot fit; the message says what would make it fit.
    """
    machines = json.loads(os.environ.get(VARIABLE) or "{}") if booked is None else booked
    asked = {stage: machines[stage] for stage in _STAGES if _known(machines.get(stage))}
    if not asked:
        return
    configs = stage_configs(parameters)
    starts = {"sft": str(parameters.get("sft_model_uri") or "")}
    for stage, machine in asked.items():
        if not starts.get(stage):
            check_fit(
                configs[stage],
                Machine(gpus=machine["gpus"], gpu_memory_gib=machine["gpu_memory_gib"]),
            )


def _known(machine: Mapping[str, Any] | None) -> bool:
    return bool(machine and machine.get("gpus") and machine.get("gpu_memory_gib"))
