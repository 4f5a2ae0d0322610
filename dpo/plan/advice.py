"""Settings with which a training fits that doesn't, each checked by the same account."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dpo.config.schema import RunConfig
from dpo.plan.architecture import architecture_of
from dpo.plan.job import FEW_TOKENS, GIB, Machine, job_of, mode_of, tokens_at_once
from dpo.plan.lengths import DEFAULT, Lengths
from dpo.plan.memory import predict
from dpo.plan.shape import Architecture
from dpo.plan.split import is_taken, next_batch

_MOST_GPUS = 1024
_HALF_GATHERED = "model.fsdp_policy_mp=bfloat16"


@dataclass(frozen=True)
class _Change:
    """A change of settings and the words for it."""

    words: str
    config: RunConfig
    machine: Machine


def advice(
    config: RunConfig, shape: Architecture, machine: Machine, lengths: Lengths
) -> Iterator[str]:
    """Changes with which it fits: each alone, then all that cost no quality together.

    The latter only if none of the former does on the GPUs that there are.
    """
    found, on_these_gpus = 0, False
    config = _with(config, micro_batch_tokens=tokens_at_once(config, shape, machine))
    for changes in (_alone(config, machine), _together(config, machine)):
        if on_these_gpus:
            break
        for change in changes:
            job = job_of(change.config, shape, change.machine, lengths)
            total = predict(job).total / GIB
            if total <= machine.memory_gib:
                found += 1
                on_these_gpus |= change.machine.gpus == machine.gpus
                yield f"{change.words}: {total:.1f} GiB a GPU"
    if not found:
        yield (
            f"nothing that this project can set makes it fit into {machine.memory_gib:g} GiB: "
            "take a smaller model or GPUs with more memory"
        )


def _alone(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    yield from _smaller_batches(config, machine)
    yield from _half_gathered(config, machine)
    for mode in ("selective", "full"):
        if config.activation_checkpointing == "none":
            words = f"activation_checkpointing={mode}"
            yield _Change(words, _with(config, activation_checkpointing=mode), machine)
    if config.optimizer == "AdamW":
        yield _Change("optimizer=RMSprop", _with(config, optimizer="RMSprop"), machine)
    yield from _more_gpus(config, machine)
    yield from _adapters(config, machine)


def _together(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    tokens = min(config.micro_batch_tokens or FEW_TOKENS, config.max_length)
    frugal = _with(config, activation_checkpointing="full", micro_batch_tokens=tokens)
    words = f"activation_checkpointing=full micro_batch_tokens={tokens}"
    for half in _half_gathered(frugal, machine):
        frugal, words = half.config, f"{words} {half.words}"
    yield _Change(words, frugal, machine)
    for change in _more_gpus(frugal, machine):
        yield replace(change, words=f"{words} {change.words}")
    for change in _adapters(frugal, machine):
        yield replace(change, words=f"{words} {change.words}")


def _smaller_batches(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    tokens = (config.micro_batch_tokens or FEW_TOKENS) // 2
    if tokens >= config.max_length:
        words = f"micro_batch_tokens={tokens}"
        yield _Change(words, _with(config, micro_batch_tokens=tokens), machine)


def _half_gathered(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    """Weights gathered in bfloat16.

    Of weights that are gathered in float32, autocast keeps a cast of each for the backward pass:
    the whole model, on every GPU.
    """
    sharded = config.trainer.name == "FSDPTrainer" and machine.gpus > 1
    if sharded and mode_of(config, machine) == "autocast":
        yield _Change(_HALF_GATHERED, _with_half_gathered(config), machine)


def _with_half_gathered(config: RunConfig) -> RunConfig:
    model = config.model.model_copy(update={"fsdp_policy_mp": "bfloat16"})
    return _with(config, model=model)


def _more_gpus(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    """The first doubling that fits is enough: the caller keeps those that do."""
    sharded = config.trainer.name != "BasicTrainer"
    words = "" if sharded else "trainer=FSDPTrainer "
    trainer = config.trainer.model_copy(update={"name": "FSDPTrainer"})
    spread = config if sharded else _with(config, trainer=trainer)
    for half in _half_gathered(spread, replace(machine, gpus=2)):
        spread, words = half.config, f"{words}{half.words} "
    more = 2 * max(1, machine.gpus) if sharded else max(2, machine.gpus)
    shape = architecture_of(config.model)
    while more <= _MOST_GPUS:
        bigger = replace(machine, gpus=more)
        fitted = _with(spread, batch_size=next_batch(spread, more))
        job = job_of(fitted, shape, bigger, DEFAULT)
        if predict(job).total <= machine.memory_gib * GIB and is_taken(fitted, shape, more):
            batch = f" batch_size={fitted.batch_size}" if fitted != spread else ""
            yield _Change(f"{words}gpus={more}{batch}", fitted, bigger)
            return
        more *= 2


def _adapters(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    if not config.lora.enabled and config.trainer.name != "TensorParallelTrainer":
        chosen = config.lora.model_copy(update={"enabled": True})
        yield _Change("lora.enabled=true", _with(config, lora=chosen), machine)


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update=changes)
