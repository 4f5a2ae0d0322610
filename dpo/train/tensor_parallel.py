"""Tensor parallelism: the heads, the inner features and the vocabulary of a model over processes.

Every weight becomes a DTensor, those that are not split (norms) replicated ones, so that gradient
norm, optimiser and checkpoints see one kind. Activations between the modules are whole, ordinary
tensors. Attention sees fewer heads, nothing else, so packed rows need nothing of their own.

A model that one process has read is handed over module by module, and each process keeps its share
of it: no process but the first ever holds more than its share and one module.
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

from dpo.distributed.weights import take_from_first
from dpo.errors import ConfigError
from dpo.plan.split import check_split


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
"""By ``model_type``, those of ``dpo.plan.split``: how the modules whose names end so are split."""


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
    counts = {
        count.what: int(value)
        for count in _COUNTS
        if (value := getattr(config, count.key, None)) is not None
    }
    check_split(config.model_type, counts, size)


def parallelize(model: Any, mesh: DeviceMesh, *, device: str | None = None) -> None:
    """Split ``model`` over ``mesh``; in place.

    Args:
        model: The same in every process.
        mesh: The processes that share each layer.
        device: Where each process is to hold its share of the first process's weights, which are
            handed over module by module (also to the other processes of the job); None: every
            process has the whole model where it wants it.

    Raises:
        ConfigError: as ``check_model``.
    """
    check_model(model.config, mesh.size())
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    styles = _styles(model)
    # the embeddings first: tied output weights are then those, and not handed over again
    for module in sorted(styles, key=lambda module: module is not embedding):
        if tied and module is output:
            output.weight = embedding.weight
        if device:
            take_from_first(module, device)
        # every process has the whole of it: each takes its share, and sends nothing
        parallelize_module(module, mesh, styles[module], src_data_rank=None)
    if tied:
        output.weight = embedding.weight
    if device:
        # what belongs to no such module: tables of rotations
        take_from_first(model, device)
    plain = [n for n, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    if plain:
        raise ConfigError(
            f"tensor parallelism does not know {', '.join(plain[:3])}",
            where="trainer=TensorParallelTrainer",
            fix="use trainer=FSDPTrainer",
        )


def _styles(model: Any) -> dict[nn.Module, ParallelStyle]:
    """How each module with weights is split, in the model's order."""
    plan = PLANS[model.config.model_type]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    styles: dict[nn.Module, ParallelStyle] = {}
    for name, module in model.named_modules():
        if module is embedding:
            styles[module] = RowwiseParallel(input_layouts=Replicate())
        elif module is output:
            styles[module] = ColwiseParallel(output_layouts=Replicate())
        for ending, style in plan.items():
            if name == ending or name.endswith(f".{ending}"):
                styles[module] = style()
    return styles
