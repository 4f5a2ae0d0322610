"""``dpo plan``: what a run will need, as text or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.errors import ConfigError, DpoError
from dpo.plan.architecture import architecture_of
from dpo.plan.estimate import Plan, plan_stage, with_peak
from dpo.plan.found_lengths import find_lengths
from dpo.plan.job import GIB, Machine, job_of
from dpo.plan.lengths import Lengths

DOES_NOT_FIT = 2
KEYS: dict[str, tuple[Callable[[str], Any], str]] = {
    "gpus": (int, "GPUs over all hosts (default 1; 0: one process on a CPU)"),
    "gpu": (str.upper, "their name, such as H100 (default A100)"),
    "gpu_memory_gib": (float, "memory of one GPU, in GiB (default: that of gpu)"),
    "peak_tflops": (
        float,
        "dense peak of one GPU in the type of the products, in TFLOP/s (default: that of gpu)",
    ),
    "utilisation": (float, "share of the peak that training reaches (default 0.25)"),
    "pairs": (int, "training pairs (default: those of the data)"),
    "prompt_tokens": (float, "mean tokens of a prompt (default: those of the data)"),
    "chosen_tokens": (float, "mean tokens of a chosen response"),
    "rejected_tokens": (float, "mean tokens of a rejected response"),
    "simulate": (bool, "true: measure a step under fake tensors (default where torch is here)"),
}
"""Keys of the command that are no settings of a run: type and description."""
_LENGTHS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")


def take_keys(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The command's own keys with their values, and the rest: settings of the run.

    Raises:
        ConfigError: a value of the wrong type.
    """
    own: dict[str, Any] = {}
    settings = []
    for word in words:
        key, separator, text = word.partition("=")
        if key not in KEYS or not separator:
            settings.append(word)
            continue
        own[key] = _value(key, text)
    return own, settings


def _value(key: str, text: str) -> Any:
    kind, description = KEYS[key]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={text}: expected true or false", fix=f"{key}: {description}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{key}={text}: expected a number", fix=f"{key}: {description}") from None


def make_plan(config: RunConfig, own: dict[str, Any], data: Path | None) -> Plan:
    """The plan of ``config`` with the command's own keys.

    Raises:
        DpoError: an unknown model, a key that cannot work, or data that is not there.
    """
    given = {key: own[key] for key in own if key not in ("pairs", "simulate", *_LENGTHS)}
    machine = Machine(**given)
    lengths = _lengths(config, own, data)
    plan = plan_stage(config, machine, lengths)
    named = config.lora.enabled and config.lora.modules != "all"
    has_torch = find_spec("torch") is not None
    if named and has_torch:
        plan = _with_adapter_checked(config, plan)
    wanted = own.get("simulate", has_torch)
    return simulated(config, plan) if wanted and can_simulate(config) else plan


def _with_adapter_checked(config: RunConfig, plan: Plan) -> Plan:
    """The plan, where the model has the layers that the adapter is to change.

    Raises:
        DpoError: it has none of such a name.
    """
    try:
        import_module("dpo.train.simulate").check_adapter(config)
    except DpoError:
        raise
    except Exception:
        # a kind that only code of its own can make
        text = "whether the model has the layers of lora.modules was not checked"
        return replace(plan, warnings=(*plan.warnings, text))
    return plan


def can_simulate(config: RunConfig) -> bool:
    """Whether a step of this configuration can be passed under fake tensors (peft's cannot)."""
    spread = config.trainer.name == "TensorParallelTrainer" or config.trainer.replicas > 1
    return not spread and not config.lora.enabled


def simulated(config: RunConfig, plan: Plan) -> Plan:
    """The plan with the peak of a step under fake tensors in place of the account's.

    The account still says what the memory is used for; what the step needs beside it counts as
    activations. Where a step cannot be simulated, the account's plan says so and stays.

    Raises:
        DpoError: no model can be built from the architecture.
    """
    # by name: this package is imported where there is no torch
    peak_bytes = import_module("dpo.train.simulate").peak_bytes
    shape = architecture_of(config.model)
    job = job_of(config, shape, plan.machine, plan.lengths)
    try:
        peak = peak_bytes(
            config.model_copy(update={"micro_batch_tokens": job.micro_batch_tokens}),
            gpus=job.devices,
            dtype=_products(config, job.mode),
            row=_row(job.micro_batch_tokens, plan.lengths),
            n_rows=2 if job.several_micro_batches else 1,
            on_gpu=job.on_gpu,
        )
    except DpoError:
        raise
    except Exception as error:
        # a model's own code, under tensors without values
        return _by_account(plan, error)
    changed = with_peak(plan, peak)
    if changed.fits or plan.advice:
        return changed
    # the account is below the step: look for what fits into as much less
    share = (plan.memory.total - plan.memory.reserve) / peak
    smaller = replace(plan.machine, gpu_memory_gib=plan.machine.memory_gib * share)
    return replace(changed, advice=plan_stage(config, smaller, plan.lengths).advice)


def _by_account(plan: Plan, error: Exception) -> Plan:
    reason = " ".join(str(error).split())[:120]
    text = f"a step of this model could not be simulated ({type(error).__name__}: {reason})"
    return replace(plan, warnings=(*plan.warnings, f"{text}; this is the account"))


def _products(config: RunConfig, mode: str) -> str:
    """The type of the products."""
    model = config.model
    if mode == "float32":
        return "float32"
    if model.policy_dtype != "float32":
        return model.policy_dtype
    return model.fsdp_policy_mp or "bfloat16"


def _row(n_tokens: int, lengths: Lengths) -> tuple[int, int, int]:
    """A row of ``n_tokens`` with the shares of prompt and responses that the data has."""
    responses = [round(n_tokens * length / lengths.tokens) for length in lengths.responses]
    chosen, rejected = (*responses, 1)[:2]
    return max(1, n_tokens - sum(responses)), chosen, rejected


def _lengths(config: RunConfig, own: dict[str, Any], data: Path | None) -> Lengths:
    stated = {key.removesuffix("_tokens"): own[key] for key in _LENGTHS if key in own}
    if stated and len(stated) < len(_LENGTHS):
        missing = next(key for key in _LENGTHS if key not in own)
        raise ConfigError(f"{missing} is missing", fix=f"give all of {', '.join(_LENGTHS)}")
    if not all(0 < value < math.inf for value in stated.values()):
        raise ConfigError("lengths must be above 0", fix=f"correct {', '.join(_LENGTHS)}")
    if own.get("pairs", 1) < 1:
        raise ConfigError(
            f"pairs={own['pairs']} is no number of training pairs",
            fix="give 1 or more, or leave it out for those of the data",
        )
    found = Lengths(**stated, source="as given") if stated else find_lengths(config, data)
    if "pairs" in own:
        found = replace(found, pairs=own["pairs"], different=None)
    return found


def as_text(plan: Plan) -> str:
    """The plan as lines for a person."""
    machine, memory, lengths = plan.machine, plan.memory, plan.lengths
    where = f"{machine.gpus} x {machine.gpu}" if machine.gpus else "one CPU process"
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
        "driver, allocator": memory.reserve,
    }
    shares = [f"  {name:18} {value / GIB:8.2f} GiB" for name, value in parts.items() if value]
    limit = f" of {machine.memory_gib:g} GiB" if machine.gpus else ""
    peak = "peak memory a GPU" if machine.gpus else "peak memory"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return "\n".join(
        [
            f"{plan.stage} training of {plan.model} ({plan.parameters / 1e6:,.1f} M weights) "
            f"on {where}",
            "",
            f"{peak:17}  {memory.total / GIB:10.2f} GiB{limit}: {verdict} "
            f"({'a step under fake tensors' if plan.simulated else 'by account'})",
            *shares,
            "",
            f"tokens at once     {plan.micro_batch_tokens:10,}  (at most; micro_batch_tokens)",
            f"tokens a pair      {lengths.tokens:10.1f}  (prompt {lengths.prompt:.0f}, responses "
            f"{', '.join(f'{value:.0f}' for value in lengths.responses)}; {lengths.source})",
            f"TFLOP a pair       {plan.flops.training / 1e12:10.4g}",
            *_times(plan),
            *(f"warning: {text}" for text in plan.warnings),
            *(["", "it would fit with one of:"] if plan.advice else []),
            *(f"  {text}" for text in plan.advice),
        ]
    )


def _times(plan: Plan) -> list[str]:
    if plan.tflops is None:
        return ["time               unknown: give peak_tflops=..., that of this CPU"]
    device = "a GPU" if plan.machine.gpus else "of the CPU"
    share = f"{plan.machine.utilisation:.0%} of {plan.tflops:g} TFLOP/s {device}"
    lines = [f"pairs a second     {plan.pairs_per_second:10.4g}  (at {share})"]
    if plan.training_seconds is None:
        return [*lines, "time               unknown: give n_examples=..., pairs=... or data=..."]
    lines += [f"training           {_duration(plan.training_seconds):>10}  ({plan.pairs:,} pairs)"]
    if plan.reference_seconds:
        lines.append(f"reference pass     {_duration(plan.reference_seconds):>10}  (once)")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run(config: RunConfig, own: dict[str, Any], data: Path | None, *, as_json: bool) -> int:
    """Print the plan; 0 where it fits, else 2."""
    plan = make_plan(config, own, data)
    print(json.dumps(plan.as_json(), indent=1) if as_json else as_text(plan))
    return 0 if plan.fits else DOES_NOT_FIT
