"""A plan: what a training stage needs on a machine, whether it fits, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.plan.advice import advice
from dpo.plan.architecture import architecture_of
from dpo.plan.compute import Flops, flops, seconds
from dpo.plan.job import GIB, Machine, job_of, lora_rank, products_of, tokens_at_once
from dpo.plan.kinds import KNOWN_MARGIN, UNKNOWN_MARGIN
from dpo.plan.lengths import DEFAULT, Lengths
from dpo.plan.memory import COMPARED, Memory, predict, reserve
from dpo.plan.shape import Architecture, check_length
from dpo.plan.split import check_spread

_RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}


@dataclass(frozen=True)
class Plan:
    """What one training stage will need."""

    stage: str
    model: str
    parameters: int
    parameters_margin: float
    """Share of the parameters by which they may be wrong."""
    machine: Machine
    tflops: float | None
    """Peak of one device in the type of the products; None where nothing says it (a CPU)."""
    lengths: Lengths
    micro_batch_tokens: int
    """Tokens that go through the model at once on a device, at most."""
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
            "micro_batch_tokens": self.micro_batch_tokens,
            "memory_gib": {**parts, "total": round(self.memory.total / GIB, 4)},
            "tflop_a_pair": self.flops.training / 1e12,
            "tokens_a_pair": self.lengths.tokens,
            "lengths": asdict(self.lengths),
            "pairs": self.pairs,
            "utilisation": self.machine.utilisation,
            "peak_tflops": self.tflops,
            "pairs_per_second": self.pairs_per_second,
            "training_seconds": self.training_seconds,
            "reference_seconds": self.reference_seconds,
            "advice": list(self.advice),
            "warnings": list(self.warnings),
        }

    @property
    def pairs_per_second(self) -> float | None:
        """Of training, on all GPUs together; None where no peak is known."""
        time = _time(self.flops.training, self.machine, self.tflops)
        return None if time is None else 1 / time


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
    tflops = machine.tflops(products_of(config, machine))
    frozen = lora_rank(config) is not None
    each = flops(
        shape,
        found,
        recomputed_share=_RECOMPUTED[config.activation_checkpointing],
        frozen=frozen,
    )
    pairs = _pairs(config, found)
    fits = memory.total <= machine.memory_gib * GIB or machine.gpus == 0
    reads = config.loss.needs_reference
    unique = None if pairs is None else min(pairs, found.different or found.pairs or pairs)
    return Plan(
        stage=stage,
        model=config.model.name_or_path,
        parameters=shape.parameters,
        parameters_margin=KNOWN_MARGIN if shape.known else UNKNOWN_MARGIN,
        machine=machine,
        tflops=tflops,
        lengths=found,
        micro_batch_tokens=tokens_at_once(config, shape, machine),
        memory=memory,
        flops=each,
        pairs=pairs,
        training_seconds=_time(each.training, machine, tflops, pairs),
        reference_seconds=_time(reads * each.forward, machine, tflops, unique),
        fits=fits,
        advice=() if fits or not advise else tuple(advice(config, shape, machine, found)),
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


def _pairs(config: RunConfig, lengths: Lengths) -> int | None:
    bounds = [] if config.n_examples is None else [config.n_examples]
    if lengths.pairs and config.n_epochs is not None:
        bounds.append(lengths.pairs * config.n_epochs)
    return min(bounds, default=None)


def _time(
    operations: float, machine: Machine, tflops: float | None, times: int | None = 1
) -> float | None:
    """Seconds of so many operations on all devices; None where peak or number is not known."""
    if tflops is None or times is None:
        return None
    return times * seconds(
        operations,
        gpus=max(1, machine.gpus),
        peak_tflops=tflops,
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
