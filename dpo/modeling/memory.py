"""What a GPU reports (its memory is full, it has failed), as a message."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo.errors import TrainingError

_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "'out of memory'")
"""Of what works beside torch's allocator: the driver, cuBLAS, NCCL."""
_TOO_OLD = "no kernel image is available"
_REPORTS = (
    (
        ("uncorrectable ECC error", "uncorrectable NVLink error"),
        "the GPU has failed",
        "look at `nvidia-smi -q` and at Xid lines in the node's kernel log. The same command, with "
        "another GPU, goes on from the last checkpoint",
    ),
    (
        ("hardware stack error", "unspecified launch failure"),
        "a kernel on the GPU has failed",
        "Xid lines in the node's kernel log tell a broken GPU from a bug in a kernel. The same "
        "command goes on from the last checkpoint",
    ),
    (
        ("device(s) is/are busy or unavailable",),
        "the GPU is not free",
        "nvidia-smi shows who holds it: end that process, or choose another GPU",
    ),
)
"""Words of CUDA, what they mean, and what to do."""


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn errors of a GPU that are no bugs into ours; use it with ``with`` or as a decorator.

    Raises:
        TrainingError: the memory of a GPU is full, torch has no code for it, or it has failed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = " ".join(str(error).split()).partition(" GPU ")[0].removesuffix(".")
        raise _full(first) from None
    except RuntimeError as error:
        if problem := _of_gpu(" ".join(str(error).split())):
            raise problem from None
        raise


def _full(reason: str) -> TrainingError:
    return TrainingError(
        f"the memory of the GPU is full: {reason}",
        where=_place(),
        fix="set a smaller micro_batch_tokens, or activation_checkpointing=full; `dpo plan` "
        "says what fits. Another program may hold the rest: nvidia-smi shows it",
    )


def _of_gpu(text: str) -> TrainingError | None:
    """What ``text`` means, where it is about a GPU and no bug."""
    if any(words in text for words in _FULL):
        return _full(text[:200])
    if _TOO_OLD in text:
        built = " ".join(torch.cuda.get_arch_list())
        return TrainingError(
            f"torch {torch.__version__} has no code for this GPU (it has {built or 'none'})",
            where=_place(),
            fix="use a newer GPU, or a torch that was built for this one",
        )
    for reports, meaning, fix in _REPORTS:
        if any(words in text for words in reports):
            return TrainingError(f"{meaning}: {text[:200]}", where=_place(), fix=fix)
    return None


def _place() -> str:
    """Which GPU, as far as it can still be asked."""
    host = f"host {os.uname().nodename}"
    try:
        return f"{host}, GPU {torch.cuda.current_device()}"
    except (RuntimeError, AssertionError):
        return host
