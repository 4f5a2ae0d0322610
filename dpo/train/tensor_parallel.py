"""Tensor parallelism: the heads, the inner features and the vocabulary of a model over processes.

Every weight becomes a DTensor, those that are not split (norms) replicated ones, so that gradient
norm, optimiser and checkpoints see one kind. Activations between the modules are whole, ordinary
tensors. Attention sees fewer heads, nothing else, so packed rows need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from dpo.errors import ConfigError


class _Whole(ParallelStyle):
    """A module whose weights every process holds, as replicated DTensors.

    It computes with ordinary tensors, so kernels that know nothing of DTensors keep working.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute_module(module, device_mesh)
        module.forward = partial(_with_local_weights, module, module.forward)
        return module


def _with_local_weights(module: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """``forward``, while the module's weights are what this process holds of them."""
    weights = {name: weight for name, weight in module._parameters.items() if weight is not None}
    for name, weight in weights.items():
        del module._parameters[name]
        # past __setattr__, which takes it for a parameter
        module.__dict__[name] = weight.to_local()
    try:
        return forward(*inputs)
    finally:
        for name, weight in weights.items():
            del module.__dict__[name]
            module._parameters[name] = weight


Plan = dict[str, Callable[[], ParallelStyle]]
_LLAMA: Plan = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
    "input_layernorm": _Whole,
    "post_attention_layernorm": _Whole,
    "model.norm": _Whole,
}
# queries, keys and values of one head lie together, so whole heads are split off
_GPT_NEOX: Plan = {
    "attention.query_key_value": ColwiseParallel,
    "attention.dense": RowwiseParallel,
    "mlp.dense_h_to_4h": ColwiseParallel,
    "mlp.dense_4h_to_h": RowwiseParallel,
    "input_layernorm": _Whole,
    "post_attention_layernorm": _Whole,
    "gpt_neox.final_layer_norm": _Whole,
}
PLANS: dict[str, Plan] = {"llama": _LLAMA, "mistral": _LLAMA, "gpt_neox": _GPT_NEOX}
"""By ``model_type``: how the modules whose names end so are split."""


@dataclass(frozen=True)
class _Count:
    """Something of the model that has to come out whole on every process."""

    what: str
    key: str


_COUNTS = (
    _Count("attention heads", "num_attention_heads"),
    _Count("key/value heads", "num_key_value_heads"),
    _Count("inner features", "intermediate_size"),
    _Count("tokens in the vocabulary", "vocab_size"),
)


def check_model(config: Any, size: int) -> None:
    """Refuse a model that ``size`` processes cannot share.

    Raises:
        ConfigError: another architecture, or a count that does not come out; names what works.
    """
    if config.model_type not in PLANS:
        raise ConfigError(
            f"tensor parallelism is not available for {config.model_type} models",
            where="trainer=TensorParallelTrainer",
            fix=f"use trainer=FSDPTrainer, which takes every model; this one takes "
            f"{', '.join(sorted(PLANS))}",
        )
    counts = {
        count.what: int(value)
        for count in _COUNTS
        if (value := getattr(config, count.key, None)) is not None
    }
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


def parallelize(model: Any, mesh: DeviceMesh) -> None:
    """Split ``model``, which every process holds whole, over ``mesh``; in place.

    Raises:
        ConfigError: as ``check_model``.
    """
    check_model(model.config, mesh.size())
    plan = PLANS[model.config.model_type]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        if module is embedding:
            styles[name] = RowwiseParallel(input_layouts=Replicate())
        elif module is output:
            styles[name] = ColwiseParallel(output_layouts=Replicate())
        for ending, style in plan.items():
            if name == ending or name.endswith(f".{ending}"):
                styles[name] = style()
    parallelize_module(model, mesh, styles)
    if tied:
        output.weight = embedding.weight
    plain = [n for n, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if plain:
        raise ConfigError(
            f"tensor parallelism does not know {', '.join(plain[:3])}",
            where="trainer=TensorParallelTrainer",
            fix="use trainer=FSDPTrainer",
        )
