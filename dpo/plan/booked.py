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
from dpo.errors import ConfigError
from dpo.plan.job import Machine
from dpo.plan.preflight import check_fit

VARIABLE = "DPO_MACHINE"
"""JSON: for ``sft`` and ``preference`` nodes, GPUs of a node, and the memory of a GPU in GiB."""
_STAGES: tuple[Stage, ...] = ("sft", "preference")


def check_booked(parameters: Mapping[str, Any], booked: Mapping[str, Any] | None = None) -> None:
    """Refuse a run whose training cannot use, or cannot fit, what its deployment books.

    Args:
        parameters: Pipeline parameters by name.
        booked: By stage ``nodes``, ``gpus`` of each and ``gpu_memory_gib``; None reads
            ``DPO_MACHINE``. Whether it fits is not asked of a stage without GPUs, or whose GPUs'
            memory nobody said.

    Raises:
        ConfigError: a trainer of one process for several nodes; or it cannot fit, and the message
            says what would make it fit.
    """
    machines = json.loads(os.environ.get(VARIABLE) or "{}") if booked is None else booked
    asked = {stage: machines[stage] for stage in _STAGES if _to_check(machines.get(stage))}
    if not asked:
        return
    configs = stage_configs(parameters)
    starts = {"sft": str(parameters.get("sft_model_uri") or "")}
    for stage, machine in asked.items():
        if starts.get(stage):
            continue
        nodes = int(machine.get("nodes") or 1)
        if nodes > 1 and configs[stage].trainer.name == "BasicTrainer":
            raise one_process(nodes, stage)
        if _known(machine):
            gpus = nodes * machine["gpus"]
            check_fit(configs[stage], Machine(gpus=gpus, gpu_memory_gib=machine["gpu_memory_gib"]))


def one_process(nodes: int, stage: str) -> ConfigError:
    """What is wrong with ``trainer=BasicTrainer`` where a package trains over several nodes."""
    return ConfigError(
        f"trainer=BasicTrainer is one process; the package trains over {nodes} nodes",
        where=f"{stage}.trainer",
        fix=f'set trainer=FSDPTrainer (in the form: "trainer=FSDPTrainer" in {stage}_overrides), '
        "or train on one node (leave out --nodes)",
    )


def _to_check(machine: Mapping[str, Any] | None) -> bool:
    return bool(machine) and (int((machine or {}).get("nodes") or 1) > 1 or _known(machine))


def _known(machine: Mapping[str, Any] | None) -> bool:
    return bool(machine and machine.get("gpus") and machine.get("gpu_memory_gib"))
