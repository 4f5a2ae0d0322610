"""Numbers of processes that a model or a trainer can be spread over; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from dpo.config.schema import RunConfig
from dpo.errors import ConfigError
from dpo.plan.shape import Architecture

SPLIT_TYPES = ("gpt_neox", "llama", "mistral")
"""``model_type`` of the models whose layers can be split over processes (tensor parallel)."""


def check_divides(size: int, world: int, key: str) -> None:
    """Refuse groups of processes that do not come out.

    Args:
        size: Processes of a group, or groups.
        world: All processes.
        key: The setting that asks for it.

    Raises:
        ConfigError: ``size`` does not divide ``world``.
    """
    if world % size:
        possible = [str(n) for n in range(1, world + 1) if world % n == 0]
        raise ConfigError(
            f"{key} is {size}, which does not divide the {world} processes",
            where=key,
            fix=f"use one of {', '.join(possible)}, or another number of processes",
        )


def check_split(model_type: str, counts: Mapping[str, int], size: int) -> None:
    """Refuse a model whose layers ``size`` processes cannot share.

    Args:
        model_type: Of the model.
        counts: What has to come out whole on every process, by its name in a message.
        size: Processes that share each layer.

    Raises:
        ConfigError: another architecture, or a count that does not come out; names what works.
    """
    if model_type not in SPLIT_TYPES:
        raise ConfigError(
            f"tensor parallelism is not available for {model_type} models",
            where="trainer=TensorParallelTrainer",
            fix=f"use trainer=FSDPTrainer, which takes every model; this one takes "
            f"{', '.join(SPLIT_TYPES)}",
        )
    wrong = [f"{number:,} {what}" for what, number in counts.items() if number % size]
    if wrong:
        most = min(counts.values())
        possible = [
            str(n) for n in range(2, most + 1) if all(number % n == 0 for number in counts.values())
        ]
        raise ConfigError(
            f"{size} processes cannot share this model: it has {', '.join(wrong)}",
            where="trainer=TensorParallelTrainer",
            fix=f"possible numbers are {', '.join(possible)} (trainer.tensor_parallel)"
            if possible
            else "no number of processes divides it: use trainer=FSDPTrainer",
        )


def check_spread(config: RunConfig, shape: Architecture, processes: int) -> None:
    """Refuse, before anything is started, what a trainer of several processes would refuse.

    Args:
        config: Settings of a training stage.
        shape: The model.
        processes: All that train together.

    Raises:
        ConfigError: groups, a model's counts or a batch that do not come out, or LoRA with tensor
            parallelism.
    """
    check_counts(config, processes)
    if config.trainer.name != "TensorParallelTrainer":
        return
    counts = {
        "attention heads": shape.n_heads,
        "key/value heads": shape.n_kv_heads,
        "inner features": shape.mlp_width,
        "tokens in the vocabulary": shape.vocabulary,
    }
    check_split(shape.model_type, counts, config.trainer.tensor_parallel or processes)


def check_counts(config: RunConfig, processes: int) -> None:
    """What of ``check_spread`` is known without the model.

    Raises:
        ConfigError: groups or a batch that do not come out, or LoRA with tensor parallelism.
    """
    trainer = config.trainer
    if trainer.name == "BasicTrainer":
        return
    if trainer.name == "TensorParallelTrainer":
        check_lora(config)
        size = trainer.tensor_parallel or processes
        check_divides(size, processes, "trainer.tensor_parallel")
    check_divides(trainer.replicas, processes, "trainer.replicas")
    check_batch(config.batch_size, config.gradient_accumulation_steps, shares(config, processes))


def is_taken(config: RunConfig, shape: Architecture, processes: int) -> bool:
    """Whether ``check_spread`` refuses nothing."""
    try:
        check_spread(config, shape, processes)
    except ConfigError:
        return False
    return True


def next_batch(config: RunConfig, processes: int) -> int:
    """The smallest batch, of at least the configured size, that ``processes`` can share."""
    parts = config.gradient_accumulation_steps * max(1, shares(config, processes))
    return _multiple_from(config.batch_size, parts)


def _multiple_from(least: int, parts: int) -> int:
    """The smallest multiple of ``parts`` that is not below ``least``."""
    return -(-least // parts) * parts


def shares(config: RunConfig, processes: int) -> int:
    """Of how many processes each takes other examples: those that share layers count as one."""
    if config.trainer.name != "TensorParallelTrainer":
        return processes
    return processes // (config.trainer.tensor_parallel or processes)


def check_lora(config: RunConfig) -> None:
    """Refuse an adapter where layers are split.

    Raises:
        ConfigError: ``lora.enabled`` with tensor parallelism.
    """
    if config.lora.enabled and config.trainer.name == "TensorParallelTrainer":
        raise ConfigError(
            "LoRA and tensor parallelism cannot be used together",
            where="lora.enabled",
            fix="use trainer=FSDPTrainer or BasicTrainer",
        )


def check_batch(batch_size: int, accumulation: int, shares: int) -> None:
    """Refuse a batch whose micro-batches would not be equal on every process.

    Raises:
        ConfigError: ``batch_size`` is no multiple of accumulation steps times processes.
    """
    parts = accumulation * shares
    if batch_size % parts:
        raise ConfigError(
            f"batch_size ({batch_size}) must be a multiple of gradient_accumulation_steps "
            f"({accumulation}) x processes ({shares})",
            where="batch_size",
            fix=f"use a multiple of {parts}, such as batch_size="
            f"{_multiple_from(batch_size, parts)}",
        )
