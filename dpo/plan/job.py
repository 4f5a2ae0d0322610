"""What decides the memory of a training, read from settings and a machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dpo.config.schema import RunConfig
from dpo.errors import ConfigError
from dpo.plan.adapters import lora_parameters
from dpo.plan.compute import (
    DEFAULT_GPU,
    DEFAULT_UTILISATION,
    FLOAT32_TFLOPS,
    MEMORY_GIB,
    PEAK_TFLOPS,
    WITHOUT_BFLOAT16,
)
from dpo.plan.lengths import DEFAULT, Lengths
from dpo.plan.memory import FUSED, Job, Mode, predict, scoring
from dpo.plan.shape import Architecture

GIB = float(2**30)
FEW_TOKENS = 2048
"""``micro_batch_tokens`` on a CPU, whose caches hold no more, and where nothing is known."""
_MANY_TOKENS = (16384, 8192, 4096)
"""On a GPU: a Llama of 1.2 B trained 71, 122, 202 and 259 pairs/s with 2,048 to 16,384 (H100)."""
_MORE_RESPONSES = 1.25
"""A row may hold longer responses, or shorter prompts, than all pairs on average."""
_SAFE_SHARE = 0.85
"""Of a GPU's memory, for what is chosen by the account."""


@dataclass(frozen=True)
class Machine:
    """Where the run is to happen."""

    gpus: int = 1
    """All of them, over all hosts; 0 is one process on a CPU."""
    gpu_memory_gib: float | None = None
    """Of one GPU; None takes that of ``gpu``."""
    gpu: str = DEFAULT_GPU
    utilisation: float = DEFAULT_UTILISATION
    """Share of the GPUs' peak that training reaches."""
    peak_tflops: float | None = None
    """Of one device; None takes that of ``gpu``."""

    def __post_init__(self) -> None:
        if self.gpu not in PEAK_TFLOPS and None in (self.gpu_memory_gib, self.peak_tflops):
            raise ConfigError(
                f"gpu={self.gpu} is not known",
                fix=f"name one of {', '.join(PEAK_TFLOPS)}, or give gpu_memory_gib and peak_tflops",
            )
        if not 0 <= self.gpus <= 100_000:
            raise ConfigError(f"gpus={self.gpus} is no number of GPUs", fix="give 0 (CPU) or more")
        if not 0 < self.utilisation <= 1:
            raise ConfigError(
                f"utilisation={self.utilisation} is no share", fix="give a value in (0, 1]"
            )
        for name in ("gpu_memory_gib", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"{name}={value} is no amount",
                    fix=f"give a number above 0, or leave it out for that of gpu={self.gpu}",
                )

    @property
    def memory_gib(self) -> float:
        """Of one GPU."""
        return self.gpu_memory_gib or MEMORY_GIB[self.gpu]

    def tflops(self, dtype: str) -> float | None:
        """Peak of one device for products in a type, in TFLOP/s; None of a CPU, if none was
        given."""
        if self.peak_tflops or not self.gpus:
            return self.peak_tflops
        # tensor cores without bfloat16 are of no use to it
        plain = dtype == "float32" or (dtype == "bfloat16" and self.gpu in WITHOUT_BFLOAT16)
        return (FLOAT32_TFLOPS if plain else PEAK_TFLOPS)[self.gpu]


def job_of(config: RunConfig, shape: Architecture, machine: Machine, lengths: Lengths) -> Job:
    """What ``memory.predict`` needs of a configuration."""
    devices = _devices(config, machine)
    at_once = tokens_at_once(config, shape, machine)
    share = config.batch_size / _shares(config, devices)
    micro_batches = max(config.gradient_accumulation_steps, share * lengths.tokens / at_once)
    a_step = _pairs_at_once(config, machine) * lengths.tokens
    longest = _longest(config, lengths)
    rank = lora_rank(config)
    # with a shard a group of processes, hybrid sharding shares weights within a group only
    shards = max(1, devices // config.trainer.replicas)
    return Job(
        shape=shape,
        micro_batch_tokens=round(min(at_once, max(a_step * 1.5, longest))),
        longest=min(longest, 2 * config.max_length),
        devices=shards,
        weights_dtype=config.model.policy_dtype,
        mode=mode_of(config, machine),
        optimizer=config.optimizer,
        checkpointing=config.activation_checkpointing,
        several_micro_batches=micro_batches > 1,
        adapter_parameters=None if rank is None else lora_parameters(shape, rank),
        on_gpu=machine.gpus > 0,
        split=devices // _shares(config, devices),
        fused=_is_fused(config, shape, machine),
        responses=min(1.0, _MORE_RESPONSES * sum(lengths.responses) / lengths.tokens),
    )


def _pairs_at_once(config: RunConfig, machine: Machine) -> float:
    """Pairs of a micro-batch, on one device."""
    shares = _shares(config, _devices(config, machine))
    return config.batch_size / shares / config.gradient_accumulation_steps


def _longest(config: RunConfig, lengths: Lengths) -> int:
    """Most tokens of a pair."""
    return lengths.longest or 2 * config.max_length - config.max_prompt_length


def lora_rank(config: RunConfig) -> int | None:
    """Of the adapter; None trains all weights."""
    return config.lora.rank if config.lora.enabled else None


def _devices(config: RunConfig, machine: Machine) -> int:
    return machine.gpus if config.trainer.name != "BasicTrainer" and machine.gpus > 1 else 1


def _shares(config: RunConfig, devices: int) -> int:
    """Into how many parts a batch is divided: those that share a layer see the same examples."""
    if config.trainer.name == "TensorParallelTrainer":
        return max(1, devices // (config.trainer.tensor_parallel or devices))
    return devices


def mode_of(config: RunConfig, machine: Machine) -> Mode:
    """In which types weights are gathered and multiplied."""
    if products_of(config, machine) == "float32":
        return "float32"
    return "half" if _gathered(config, machine) else "autocast"


def products_of(config: RunConfig, machine: Machine) -> str:
    """The type of matrix products."""
    if gathered := _gathered(config, machine):
        return gathered
    if config.model.compute_dtype != "auto":
        return config.model.compute_dtype
    fast = machine.gpus and machine.gpu not in WITHOUT_BFLOAT16
    return "bfloat16" if fast else "float32"


def _gathered(config: RunConfig, machine: Machine) -> str | None:
    """The type in which weights are there to be multiplied; None where they are cast for it."""
    model = config.model
    if model.policy_dtype != "float32":
        return model.policy_dtype
    return model.fsdp_policy_mp if _shares(config, _devices(config, machine)) > 1 else None


def has_fused_norms(config: RunConfig) -> bool:
    """Whether norms are one kernel on a GPU, of the models that have such (``memory.FUSED``)."""
    # liger-kernel's keep as little: 41.5 GiB where ours take 41.1 (a Llama of 1.2 B, an H100)
    return config.model.kernels != "plain" and not config.model.compile


def _is_fused(config: RunConfig, shape: Architecture, machine: Machine) -> bool:
    return machine.gpus > 0 and has_fused_norms(config) and shape.model_type in FUSED


def tokens_at_once(config: RunConfig, shape: Architecture, machine: Machine) -> int:
    """``micro_batch_tokens``; where it is left out, the most that surely fit.

    Judged by assumed lengths, so that a plan with the data's says what a run without them does.
    """
    if config.micro_batch_tokens is not None:
        return config.micro_batch_tokens

    def needed(tokens: int) -> float:
        changed = config.model_copy(update={"micro_batch_tokens": tokens})
        job = job_of(changed, shape, machine, DEFAULT)
        # the longest pairs may come together; evaluation fills rows with those of many steps
        together = _pairs_at_once(config, machine) * _longest(config, DEFAULT)
        training = replace(job, micro_batch_tokens=min(tokens, max(round(together), job.longest)))
        return max(predict(training).total, scoring(replace(job, micro_batch_tokens=tokens)))

    return _most_tokens(needed, shape, machine)


def tokens_to_score(
    config: RunConfig, shape: Architecture, machine: Machine, *, dtype: str, shards: int
) -> int:
    """Likewise, where it is left out, for a step that trains nothing and has no such settings.

    Args:
        config: Settings of such a step.
        shape: The model.
        machine: Where it runs.
        dtype: Type of the weights.
        shards: Devices that share the weights; 1: each has them all.
    """
    products: Mode = "float32" if config.model.compute_dtype == "float32" else "autocast"
    job = Job(
        shape=shape,
        micro_batch_tokens=FEW_TOKENS,
        longest=config.max_length,
        devices=shards,
        weights_dtype=dtype,
        mode=products if dtype == "float32" else "half",
        optimizer="AdamW",
        checkpointing="none",
        several_micro_batches=False,
        # nothing is trained
        adapter_parameters=0,
        on_gpu=machine.gpus > 0,
        fused=_is_fused(config, shape, machine),
    )
    return _most_tokens(
        lambda tokens: scoring(replace(job, micro_batch_tokens=tokens)), shape, machine
    )


def _most_tokens(needed: Callable[[int], float], shape: Architecture, machine: Machine) -> int:
    """The most tokens for which the account of bytes stays below the safe share."""
    if machine.gpus and shape.known:
        for tokens in _MANY_TOKENS:
            if needed(tokens) <= _SAFE_SHARE * machine.memory_gib * GIB:
                return tokens
    return FEW_TOKENS
