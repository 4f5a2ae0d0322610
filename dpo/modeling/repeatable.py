"""The same bits each time on a GPU: what going on from a checkpoint to the same weights needs.

By default the backward pass of flash attention, and sums by index, add in whatever order a GPU's
threads come to it. torch has other kinds of both; cuBLAS has where its workspace is fixed before it
is first used. Not run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo.errors import ConfigError

_WORKSPACE, _FIXED = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_REFUSED = "does not have a deterministic implementation"


def fix_workspace() -> None:
    """Before anything is multiplied on a GPU: 32 MiB, as much as cuBLAS takes on Hopper anyway."""
    os.environ.setdefault(_WORKSPACE, _FIXED)


@contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Operations that give the same bits each time, while the block runs.

    Raises:
        ConfigError: the model has an operation of which there is no such kind.
    """
    if not wanted:
        yield
        return
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # what is empty is written before it is read: nothing of ours needs it filled first
    torch.utils.deterministic.fill_uninitialized_memory = False
    # with warn_only attention would stay as it is, and warn
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if _REFUSED not in str(error):
            raise
        raise ConfigError(
            f"{str(error).split()[0]} gives other bits each time on this device, and this model "
            "needs it",
            where="deterministic=true",
            fix="set deterministic=false: what goes on from a checkpoint is then equal within "
            "rounding, not to the bit",
        ) from None
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
