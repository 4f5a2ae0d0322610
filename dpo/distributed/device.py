"""Which device a process works on."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from dpo.errors import TrainingError
from dpo.storage.progress import message

_WORKSPACE, _FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_GROWING = "expandable_segments:True"


def best_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        TrainingError: a pod was given a GPU that torch cannot use.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if found:
        _prepare_cuda()
        return "cuda"
    if _is_hidden() or not _has_nvidia_device():
        return "cpu"
    problem = _unusable([str(one.message) for one in said])
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        # days of work on a CPU, for which a GPU was booked
        raise problem
    message("device", f"{problem.found}: working on the CPU")
    return "cpu"


def _is_hidden() -> bool:
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


def _prepare_cuda() -> None:
    """Before anything is allocated or multiplied on a GPU; what the user has set stays.

    cuBLAS gets a workspace of its own (32 MiB, as much as it takes on Hopper anyway). Rows have
    other lengths each time, and torch's allocator kept 1.25 to 3 times what they needed in segments
    of fixed size.
    """
    os.environ.setdefault(_WORKSPACE, _FIXED)
    if not any(name in os.environ for name in _ALLOCATORS):
        os.environ[_ALLOCATORS[0]] = _GROWING
