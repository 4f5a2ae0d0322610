"""Types of computation: float32 masters, bfloat16 products where the hardware has them."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch

from dpo.config.models import ModelConfig
from dpo.errors import TrainingError
from dpo.modeling.repeatable import fix_workspace
from dpo.storage.progress import message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        TrainingError: a pod was given a GPU that torch cannot use.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found:
        fix_workspace()
        return "cuda"
    if is_hidden() or not _has_nvidia_device():
        return "cpu"
    problem = _unusable([str(one.message) for one in said])
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        # days of work on a CPU, for which a GPU was booked
        raise problem
    message("device", f"{problem.found}: working on the CPU")
    return "cpu"


def is_hidden() -> bool:
    """Whether the user has hidden all GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given is not None and given.strip() in ("", "-1")


def _has_nvidia_device() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _unusable(said: list[str]) -> TrainingError:
    reason = " ".join(" ".join(said).split())[:300]
    if torch.version.cuda is None:
        reason = "this torch was built without CUDA"
    return TrainingError(
        f"there is a GPU, but torch {torch.__version__} cannot use it"
        + (f" ({reason})" if reason else ""),
        where=f"host {os.uname().nodename}",
        fix="update the node's NVIDIA driver, or look at nvidia-smi; CUDA_VISIBLE_DEVICES= (empty) "
        "works on the CPU",
    )


@cache
def has_fast_bfloat16(device_type: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32.

    Measured on one core without it: 10 GFLOP/s in bfloat16, 62 in float32 (512 x 576 x 49152).
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device_type == "cpu" and bool(supported and supported())


def compute_dtype(model: ModelConfig, device_type: str) -> torch.dtype:
    """The type of matrix products that ``model.compute_dtype`` means on this device."""
    if model.policy_dtype != "float32":
        return DTYPES[model.policy_dtype]
    if model.compute_dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device_type) else torch.float32
    return DTYPES[model.compute_dtype]


def autocast(dtype: torch.dtype, device_type: str) -> AbstractContextManager[object]:
    """Products in ``dtype``, everything else in the parameters' own type.

    Casts of weights are kept for the next row by one process alone. A kept cast is older than the
    next row's forward pass, and the engine runs nodes of a backward pass from the youngest to the
    oldest: the gradients that come through it arrived after FSDP had reduced those of the block
    (a norm of 40.4 was seen where one process had 51.0). It would also keep whole weights.
    """
    if dtype == torch.float32:
        return nullcontext()
    alone = not torch.distributed.is_initialized()
    return torch.autocast(device_type, dtype=dtype, cache_enabled=alone)
