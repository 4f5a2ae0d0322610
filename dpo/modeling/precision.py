"""Types of computation: float32 masters, bfloat16 products where the hardware has them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from dpo.config.models import ModelConfig
from dpo.distributed.together import is_first
from dpo.storage.progress import message

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """As settings and records have it: ``float32``."""
    return str(dtype).removeprefix("torch.")


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


def say_if_slow(dtype: torch.dtype, device_type: str, step: str) -> None:
    """Tell of products in a type for which this processor has no instructions."""
    slow = device_type == "cpu" and dtype != torch.float32 and not has_fast_bfloat16("cpu")
    if slow and is_first():
        message(
            step,
            f"products in {name_of(dtype)}, for which this processor has no instructions: several "
            "to hundreds of times slower than in float32 (model.policy_dtype, model.compute_dtype)",
        )


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
