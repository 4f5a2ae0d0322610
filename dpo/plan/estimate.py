"""A plan: what a training stage needs on a machine, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.errors import ConfigError
from dpo.plan.adapters import lora_parameters
from dpo.plan.architecture import architecture_of
from dpo.plan.compute import (
    DEFAULT_GPU,
    DEFAULT_UTILISATION,
    MEMORY_GIB,
    PEAK_TFLOPS,
    Flops,
    flops,
    seconds,
)
from dpo.plan.kinds import KNOWN_MARGIN, UNKNOWN_MARGIN
from dpo.plan.lengths import DEFAULT, Lengths
from dpo.plan.memory import COMPARED, Job, Memory, Mode, predict, reserve
from dpo.plan.shape import Architecture, check_length
from dpo.plan.split import check_spread, is_taken, next_batch

GIB = float(2**30)
_MOST_GPUS = 1024
_RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}


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
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0")

    @property
    def memory_gib(self) -> float:
        """Of one GPU."""
        return self.gpu_memory_gib or MEMORY_GIB[self.gpu]

    @property
    def tflops(self) -> float:
        """Peak of one GPU, in TFLOP/s."""
        return self.peak_tflops or PEAK_TFLOPS[self.gpu]


@dataclass(frozen=True)
class Plan:
    """What one training stage will need."""

    stage: str
    model: str
    parameters: int
    parameters_margin: float
    """Share of the parameters by which they may be wrong."""
    machine: Machine
    lengths: Lengths
    memory: Memory
    flops: Flops
    pairs: int | None
    """Examples that the run trains on; None where nothing says how many there are."""
    training_seconds: float | None
    reference_seconds: float | None
    """Of scoring the pairs with the reference model once."""
    fits: bool
    advice: tuple[str, ...]
    """Settings with which it fits, the cheapest first; empty where it fits."""
    warnings: tuple[str, ...] = ()
    simulated: bool = False
    """The peak is that of a step under fake tensors, not the account's."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; memory in GiB a GPU, operations in TFLOP a pair, times in seconds."""
        parts = {name: round(value / GIB, 4) for name, value in asdict(self.memory).items()}
        return {
            "stage": self.stage,
            "model": self.model,
            "parameters": self.parameters,
            "parameters_margin": self.parameters_margin,
            "gpus": self.machine.gpus,
            "gpu": self.machine.gpu,
            "gpu_memory_gib": self.machine.memory_gib,
            "fits": self.fits,
            "simulated": self.simulated,
            "memory_gib": {**parts, "total": round(self.memory.total / GIB, 4)},
            "tflop_a_pair": self.flops.training / 1e12,
            "tokens_a_pair": self.lengths.tokens,
            "lengths": asdict(self.lengths),
            "pairs": self.pairs,
            "utilisation": self.machine.utilisation,
            "peak_tflops": self.machine.tflops,
            "pairs_per_second": self.pairs_per_second,
            "training_seconds": self.training_seconds,
            "reference_seconds": self.reference_seconds,
            "advice": list(self.advice),
            "warnings": list(self.warnings),
        }

    @property
    def pairs_per_second(self) -> float:
        """Of training, on all GPUs together."""
        return 1 / _time(self.flops.training, self.machine)


def plan_stage(
    config: RunConfig, machine: Machine, lengths: Lengths | None = None, *, advise: bool = True
) -> Plan:
    """Plan the training stage that ``config.loss`` names.

    Args:
        config: Settings, whole or those of a training stage.
        machine: Where it is to run.
        lengths: Of the pairs; the assumed ones when left out.
        advise: Look for settings with which it fits, where it doesn't.

    Raises:
        ModelError: the model's architecture is not known on this machine.
        ConfigError: settings that cannot work together.
    """
    shape = architecture_of(config.model)
    stage = "sft" if isinstance(config.loss, SFTLoss) else "preference"
    found = (lengths or DEFAULT).for_sft() if stage == "sft" else lengths or DEFAULT
    check_length(shape, config.max_length)
    check_spread(config, shape, max(1, machine.gpus))
    memory = predict(job_of(config, shape, machine, found))
    frozen = _lora_rank(config) is not None
    each = flops(
        shape,
        found,
        recomputed_share=_RECOMPUTED[config.activation_checkpointing],
        frozen=frozen,
    )
    pairs = _pairs(config, found)
    fits = memory.total <= machine.memory_gib * GIB or machine.gpus == 0
    reads = config.loss.needs_reference
    unique = None if pairs is None else min(pairs, found.pairs or pairs)
    return Plan(
        stage=stage,
        model=config.model.name_or_path,
        parameters=shape.parameters,
        parameters_margin=KNOWN_MARGIN if shape.known else UNKNOWN_MARGIN,
        machine=machine,
        lengths=found,
        memory=memory,
        flops=each,
        pairs=pairs,
        training_seconds=None if pairs is None else pairs * _time(each.training, machine),
        reference_seconds=(
            None if unique is None else reads * unique * _time(each.forward, machine)
        ),
        fits=fits,
        advice=() if fits or not advise else tuple(_advice(config, shape, machine, found)),
        warnings=tuple(_warnings(config, shape, machine)),
    )


def with_peak(plan: Plan, peak_bytes: float) -> Plan:
    """The plan with another peak (without driver and allocator), its split kept where it can be."""
    memory = plan.memory
    used = memory.total - memory.reserve
    activations = max(0.0, memory.activations + peak_bytes - used)
    rest = used - memory.activations
    shrink = min(1.0, peak_bytes / rest)
    changed = replace(
        memory,
        weights=memory.weights * shrink,
        gradients=memory.gradients * shrink,
        optimizer=memory.optimizer * shrink,
        logits=memory.logits * shrink,
        activations=activations,
        reserve=reserve(peak_bytes) if plan.machine.gpus else 0.0,
    )
    fits = changed.total <= plan.machine.memory_gib * GIB or plan.machine.gpus == 0
    return replace(plan, memory=changed, fits=fits, simulated=True)


def job_of(config: RunConfig, shape: Architecture, machine: Machine, lengths: Lengths) -> Job:
    """What ``memory.predict`` needs of a configuration."""
    devices = _devices(config, machine)
    share = config.batch_size / _shares(config, devices)
    micro_batches = max(
        config.gradient_accumulation_steps, share * lengths.tokens / config.micro_batch_tokens
    )
    a_step = share / config.gradient_accumulation_steps * lengths.tokens
    longest = lengths.longest or 2 * config.max_length - config.max_prompt_length
    rank = _lora_rank(config)
    # with a shard a group of processes, hybrid sharding shares weights within a group only
    shards = max(1, devices // config.trainer.replicas)
    return Job(
        shape=shape,
        micro_batch_tokens=round(min(config.micro_batch_tokens, max(a_step * 1.5, longest))),
        longest=min(longest, 2 * config.max_length),
        devices=shards,
        weights_dtype=config.model.policy_dtype,
        mode=_mode(config, machine, devices),
        optimizer=config.optimizer,
        checkpointing=config.activation_checkpointing,
        several_micro_batches=micro_batches > 1,
        adapter_parameters=None if rank is None else lora_parameters(shape, rank),
        on_gpu=machine.gpus > 0,
        split=devices // _shares(config, devices),
    )


def _lora_rank(config: RunConfig) -> int | None:
    return config.lora.rank if config.lora.enabled else None


def _devices(config: RunConfig, machine: Machine) -> int:
    return machine.gpus if config.trainer.name != "BasicTrainer" and machine.gpus > 1 else 1


def _shares(config: RunConfig, devices: int) -> int:
    """Into how many parts a batch is divided: those that share a layer see the same examples."""
    if config.trainer.name == "TensorParallelTrainer":
        return max(1, devices // (config.trainer.tensor_parallel or devices))
    return devices


def _mode(config: RunConfig, machine: Machine, devices: int) -> Mode:
    model = config.model
    if model.policy_dtype != "float32":
        return "half"
    if _shares(config, devices) > 1 and model.fsdp_policy_mp:
        return "float32" if model.fsdp_policy_mp == "float32" else "half"
    if model.compute_dtype == "auto":
        return "autocast" if machine.gpus else "float32"
    return "float32" if model.compute_dtype == "float32" else "autocast"


def _pairs(config: RunConfig, lengths: Lengths) -> int | None:
    bounds = [] if config.n_examples is None else [config.n_examples]
    if lengths.pairs and config.n_epochs is not None:
        bounds.append(lengths.pairs * config.n_epochs)
    return min(bounds, default=None)


def _time(operations: float, machine: Machine) -> float:
    return seconds(
        operations,
        gpus=max(1, machine.gpus),
        peak_tflops=machine.tflops,
        utilisation=machine.utilisation,
    )


def _warnings(config: RunConfig, shape: Architecture, machine: Machine) -> Iterator[str]:
    if not shape.known:
        yield (
            f"{shape.model_type or 'such'} models are not known here: their weights are counted "
            f"like Llama's and may be wrong by {UNKNOWN_MARGIN:.0%}, or more; activations are rough"
        )
    elif shape.model_type not in COMPARED:
        yield f"activations of {shape.model_type} models are rough; weights are right to 1 %"
    if machine.gpus > 1 and config.trainer.name == "BasicTrainer":
        yield "trainer=BasicTrainer trains in one process: FSDPTrainer shares the weights"


_HALF_GATHERED = "model.fsdp_policy_mp=bfloat16"


@dataclass(frozen=True)
class _Change:
    """A change of settings and the words for it."""

    words: str
    config: RunConfig
    machine: Machine


def _advice(
    config: RunConfig, shape: Architecture, machine: Machine, lengths: Lengths
) -> Iterator[str]:
    """Changes with which it fits: each alone, then all that cost no quality together.

    The latter only if none of the former does on the GPUs that there are.
    """
    found, on_these_gpus = 0, False
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
    tokens = min(config.micro_batch_tokens, config.max_length)
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
    tokens = config.micro_batch_tokens // 2
    if tokens >= config.max_length:
        words = f"micro_batch_tokens={tokens}"
        yield _Change(words, _with(config, micro_batch_tokens=tokens), machine)


def _half_gathered(config: RunConfig, machine: Machine) -> Iterator[_Change]:
    """Weights gathered in bfloat16.

    Of weights that are gathered in float32, autocast keeps a cast of each for the backward pass:
    the whole model, on every GPU.
    """
    sharded = config.trainer.name == "FSDPTrainer" and machine.gpus > 1
    if sharded and _mode(config, machine, machine.gpus) == "autocast":
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
