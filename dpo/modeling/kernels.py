"""``model.kernels``: whose code runs the elementwise parts of a model."""

from __future__ import annotations

import logging
import os
import shutil
from typing import Any

import torch

from dpo.errors import ConfigError, MissingDependency
from dpo.modeling.attention import ARCHITECTURES, is_known
from dpo.modeling.blocks import find_blocks
from dpo.modeling.fused import fuse
from dpo.modeling.head import has_linear_cross_entropy
from dpo.storage.host_memory import keep_freed_memory

ROW_MULTIPLE = 512
"""Rows of a compiled model are padded to a multiple of so many tokens: few shapes are compiled."""

_MOST_LENGTHS = 64
"""Lengths of rows that are compiled."""

_COMPILED = "_dpo_compiled"
_BY_TORCH = "_dpo_output_layer_by_torch"


def apply_kernels(
    model: Any,
    kernels: str,
    *,
    device: str | None = None,
    compiled: bool = False,
    output_layer: str = "tiled",
) -> None:
    """Prepare ``model`` in place; its weights and their names stay.

    Args:
        model: A causal language model of transformers.
        kernels: ``auto``, ``plain`` or ``liger``.
        device: Type of the device that it will run on; by default where its weights are.
        compiled: As ``model.compile``.
        output_layer: As ``model.output_layer``.

    Raises:
        MissingDependency: ``liger`` is asked for and not installed.
        ConfigError: it does not know the architecture, there is no GPU, or this torch lacks what
            is asked for.
    """
    keep_freed_memory()
    device = device or model.device.type
    if output_layer == "torch" and not has_linear_cross_entropy():
        raise ConfigError(
            f"torch {torch.__version__} has no chunked F.linear_cross_entropy",
            where="model.output_layer",
            fix="use model.output_layer=tiled, or torch 2.13",
        )
    setattr(model, _BY_TORCH, output_layer == "torch")
    if device == "cuda" and (compiled or kernels == "liger"):
        _check_compiler("model.compile=true" if compiled else "model.kernels=liger")
    if kernels == "liger":
        _liger(model, device)
    elif kernels == "auto" and not compiled:
        fuse(model)
    if compiled:
        compile_blocks(model)


def _check_compiler(setting: str) -> None:
    """Triton compiles what starts its kernels when they are first used, with a C compiler.

    Raises:
        ConfigError: there is none.
    """
    if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))):
        return
    raise ConfigError(
        "Triton, which makes kernels for GPUs, needs a C compiler, and there is none here",
        where=setting,
        fix="install gcc (the train image has none: build on one that has), or use "
        f"{'model.compile=false' if 'compile' in setting else 'model.kernels=auto'}",
    )


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile each transformer block for fixed shapes; attention over packed rows stays as it is.

    Raises:
        ConfigError: the architecture has no packed path, so shapes would differ in every batch.
    """
    if model.config.model_type not in ARCHITECTURES or not is_known(model):
        raise ConfigError(
            f"{model.config.model_type} models run without shared prompts, in other shapes each "
            "time: compiling them would take longer than it saves",
            where="model.compile",
            fix="set model.compile=false",
        )
    _allow_lengths(_MOST_LENGTHS)
    for block in find_blocks(model, None):
        # its function, not the module: what recomputes activations goes around it
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False)
    setattr(model, _COMPILED, True)


def _allow_lengths(n: int) -> None:
    """torch gives up on a function after 8 shapes, and runs the others as they are: a warning, and
    the rows of a step are of up to ``micro_batch_tokens / ROW_MULTIPLE`` lengths."""
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(n, _dynamo.config.recompile_limit)


def is_compiled(model: Any) -> bool:
    """Whether the blocks of ``model`` are compiled."""
    return bool(getattr(model, _COMPILED, False))


def is_by_torch(model: Any) -> bool:
    """Whether torch computes the output layer of ``model``."""
    return bool(getattr(model, _BY_TORCH, False))


def _liger(model: Any, device: str) -> None:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        raise MissingDependency(
            "model.kernels=liger, but liger-kernel is not installed",
            where="model.kernels",
            fix="pip install liger-kernel (it needs a GPU), or use model.kernels=auto",
        ) from None
    if device != "cuda":
        raise ConfigError(
            f"liger-kernel runs on a GPU; the model is on {device}",
            where="model.kernels",
            fix="use model.kernels=auto",
        )
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known:
        raise ConfigError(
            f"liger-kernel does not know {model.config.model_type} models",
            where="model.kernels",
            fix=f"use model.kernels=auto, or one of {', '.join(sorted(known))}",
        )
    # it warns of kernels for processors of other makers
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    # the output layer is ours: log-probabilities of responses alone
    monkey_patch._apply_liger_kernel_to_instance(
        model, fused_linear_cross_entropy=False, cross_entropy=False
    )
