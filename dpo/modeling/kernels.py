"""``model.kernels``: whose code runs the elementwise parts of a model."""

from __future__ import annotations

from typing import Any

from dpo.errors import ConfigError, MissingDependency
from dpo.modeling.fused import fuse
from dpo.modeling.host_memory import keep_freed_memory


def apply_kernels(model: Any, kernels: str) -> None:
    """Prepare ``model`` in place; its weights and their names stay.

    Args:
        model: A causal language model of transformers.
        kernels: ``auto``, ``plain`` or ``liger``.

    Raises:
        MissingDependency: ``liger`` is asked for and not installed.
        ConfigError: it does not know the architecture, or there is no GPU.
    """
    keep_freed_memory()
    if kernels == "liger":
        _liger(model)
    elif kernels == "auto" and model.device.type == "cpu":
        fuse(model)


def _liger(model: Any) -> None:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        raise MissingDependency(
            "model.kernels=liger, but liger-kernel is not installed",
            where="model.kernels",
            fix="pip install liger-kernel (it needs a GPU), or use model.kernels=auto",
        ) from None
    if model.device.type != "cuda":
        raise ConfigError(
            f"liger-kernel runs on a GPU; the model is on {model.device.type}",
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
    # the output layer is ours: log-probabilities of responses alone
    monkey_patch._apply_liger_kernel_to_instance(
        model, fused_linear_cross_entropy=False, cross_entropy=False
    )
