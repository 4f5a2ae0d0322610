"""The plan as a check before a run starts: the pipeline asks it, no torch is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.config.parameters import stage_configs
from dpo.config.schema import RunConfig
from dpo.errors import ConfigError, ModelError
from dpo.plan.estimate import Plan, plan_stage
from dpo.plan.job import GIB, Machine
from dpo.plan.kinds import KNOWN_MARGIN
from dpo.plan.lengths import Lengths

_SHOWN_CHANGES = 5


def preflight(
    parameters: Mapping[str, Any], machine: Machine, lengths: Lengths | None = None
) -> dict[str, Plan]:
    """Plans of both training stages of a pipeline run, by stage (``sft``, ``preference``).

    Args:
        parameters: Pipeline parameters by name, as ``dpo.data.plan.plan_run`` takes them.
        machine: GPUs of a training step, over all its hosts; ``gpus=0`` never fails.
        lengths: Of the pairs; None assumes those of HH.

    Returns:
        Nothing for a model whose architecture is not known without the hub.

    Raises:
        ConfigError: a stage does not fit; the message says by how much, and what would make it fit.
    """
    configs = stage_configs(parameters)
    plans = {}
    for stage in ("sft", "preference"):
        plan = check_fit(configs[stage], machine, lengths)
        if plan is not None:
            plans[stage] = plan
    return plans


def check_fit(config: RunConfig, machine: Machine, lengths: Lengths | None = None) -> Plan | None:
    """The plan of one training stage; None where the model's architecture is not known here.

    A plan that may be wrong by half stops only a run that would need more than twice the memory.

    Raises:
        ConfigError: it does not fit.
    """
    try:
        plan = plan_stage(config, machine, lengths)
    except ModelError:
        return None
    if not plan.fits and _least(plan) > machine.memory_gib * GIB:
        changes = "\n        ".join(plan.advice[:_SHOWN_CHANGES])
        raise ConfigError(
            f"the {plan.stage} stage of {plan.model} is predicted to need "
            f"{plan.memory.total / GIB:.1f} GiB on each of {machine.gpus} GPU(s) that have "
            f"{machine.memory_gib:g} GiB",
            where=f"{plan.stage} training",
            fix=f"one of\n        {changes}",
        )
    return plan


def _least(plan: Plan) -> float:
    """What the plan says is needed, in bytes, less what it may be wrong by where that is much."""
    share = plan.parameters_margin if plan.parameters_margin > KNOWN_MARGIN else 0.0
    return plan.memory.total * (1 - share)
