"""LoRA adapters: low-rank changes of the blocks' matrices are trained, the model itself is not.

The base is its own reference: with the adapter switched off the same weights score the pairs, so no
second model is held. An untrained adapter changes nothing (its second matrix is 0).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dpo.config.models import LoraConfig
from dpo.errors import ConfigError, ModelError
from dpo.storage.model_folder import ADAPTER_CONFIG as CONFIG
from dpo.storage.model_folder import ADAPTER_WEIGHTS as WEIGHTS

_NAME = "default"
_PREFIX = "base_model.model."
"""Of the weights' names in a file, as peft writes them."""

_FUSED = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Models whose kernels on a GPU read the weights of ``_UNSEEN`` past an adapter: peft refuses."""
_UNSEEN = frozenset({"conv1d", "out_proj"})


def add_adapter(model: Any, settings: LoraConfig, base: str) -> None:
    """Freeze ``model`` and put an untrained adapter on it, in place.

    Args:
        model: A causal language model of transformers.
        settings: Rank, alpha and the modules to change.
        base: Where the model is from, recorded beside the adapter.

    Raises:
        ConfigError: the model has no module of a given name.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    wanted = names_to_adapt(model, settings)
    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=wanted,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        fan_in_fan_out=model.config.model_type == "gpt2",
    )
    for weight in model.parameters():
        weight.requires_grad_(False)
    try:
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"no adapter can be put on this {model.config.model_type} model: {reason}",
            where="lora.modules",
            fix="choose other modules, or lora.enabled=false",
        ) from None
    model.dpo_adapter = config


def names_to_adapt(model: Any, settings: LoraConfig) -> list[str]:
    """The linear layers that get an adapter, by the last parts of their names.

    Raises:
        ConfigError: the model has no module of a given name.
    """
    known = linear_names(model)
    refused = _UNSEEN if model.config.model_type in _FUSED else frozenset()
    able = [name for name in known if name not in refused]
    wanted = able if settings.modules == "all" else list(settings.modules)
    if missing := sorted(set(wanted) - set(known)):
        raise ConfigError(
            f"lora.modules: the model has no linear layer {missing[0]} in its blocks",
            where="lora.modules",
            fix=f"choose among {', '.join(known)}, or write lora.modules=all",
        )
    if not wanted:
        raise ConfigError(
            "lora.modules names no linear layer"
            if known
            else f"{model.config.model_type} models have no linear layer for an adapter to change",
            where="lora.modules",
            fix=f"choose among {', '.join(known)}" if known else "use lora.enabled=false",
        )
    return wanted


def linear_names(model: Any) -> list[str]:
    """Last parts of the names of the linear layers inside the model's blocks."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if module is not head
            # Falcon's are called FalconLinear; routers of experts derive from torch's as well
            and type(module).__name__.endswith(("Linear", "Conv1D"))
        }
    )


def has_adapter(model: Any) -> bool:
    """Whether ``add_adapter`` was called on it."""
    return getattr(model, "dpo_adapter", None) is not None


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The base model, while the block runs: the reference of its adapter."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def whole_state(model: Any, weights: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The weights of the model with its adapter added, under the names of the base model.

    Args:
        model: A model with an adapter.
        weights: Its weights, where the model itself holds only a part of them.
    """
    state = dict(model.state_dict() if weights is None else weights)
    scales = {
        name: (layer.scaling[_NAME], layer.fan_in_fan_out)
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    merged = {}
    for name, value in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer in scales:
            scale, transposed = scales[layer]
            a_RI = state[f"{layer}.lora_A.{_NAME}.weight"].double()
            b_OR = state[f"{layer}.lora_B.{_NAME}.weight"].double()
            change_OI = (b_OR @ a_RI) * scale
            value = (value.double() + (change_OI.t() if transposed else change_OI)).to(value.dtype)
        merged[name.replace(".base_layer.", ".")] = value
    return merged


def remove_adapter(model: Any) -> None:
    """Put the base's layers back in their places."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.base_layer)
    model.dpo_adapter = None


def save_adapter(model: Any, folder: Path, weights: dict[str, Tensor] | None) -> None:
    """The adapter alone, as ``PeftModel.from_pretrained`` reads it, with its base recorded.

    Args:
        model: A model with an adapter.
        folder: Where to.
        weights: Its weights, where the model itself holds only a part of them.
    """
    from safetensors.torch import save_file

    state = model.state_dict() if weights is None else weights
    own = {
        _PREFIX + name.replace(f".{_NAME}.weight", ".weight"): value.contiguous()
        for name, value in state.items()
        if ".lora_A." in name or ".lora_B." in name
    }
    model.dpo_adapter.save_pretrained(str(folder))
    # a set has no order of its own: equal runs write equal bytes
    path = folder / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])
    values["inference_mode"] = True
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    save_file(own, str(folder / WEIGHTS), metadata={"format": "pt"})


def merge_saved(model: Any, folder: Path) -> Any:
    """``model`` with the adapter in ``folder`` added to its weights.

    Raises:
        ModelError: the adapter belongs to another model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.23 calls deprecated
            warnings.simplefilter("ignore")
            with_adapter = PeftModel.from_pretrained(model, str(folder))
            _refuse_other_names(with_adapter, folder)
            merged = with_adapter.merge_and_unload()
        # peft has frozen the base, and the merged model may be trained
        return merged.requires_grad_(True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the adapter cannot be added to its base model: {reason}",
            where=str(folder),
            fix="give the base model that it was trained on",
        ) from None


def _refuse_other_names(model: Any, folder: Path) -> None:
    """peft takes the weights whose names it knows, warns, and leaves the other layers unchanged.

    It says so where an adapter is loaded, once more here; names of older versions it translates.
    """
    found = model.load_adapter(str(folder), _NAME, torch_device="cpu")
    if found.unexpected_keys:
        raise ValueError(f"{found.unexpected_keys[0]} has no place in it")
    if found.missing_keys:
        raise ValueError(f"{found.missing_keys[0]} is not in its file")


def trained_parameters(model: Any) -> int:
    """Number of weights that are trained."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
