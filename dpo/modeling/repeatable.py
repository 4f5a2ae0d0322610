"""The same bits each time on a GPU: what going on from a checkpoint to the same weights needs.

By default the backward pass of flash attention, and sums by index, add in whatever order a GPU's
threads come to it. torch has other kinds of both; cuBLAS has where its workspace is fixed before it
is first used (``dpo.distributed.device``). On an H100 they gave the same weights each time, and
cost 1 % of the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from dpo.errors import ConfigError
from dpo.storage.progress import message

_REFUSED = "does not have a deterministic implementation"
NOT_TO_THE_BIT = "going on from a checkpoint is equal within rounding, not to the bit"

T = TypeVar("T")


@contextmanager
def in_any_order() -> Iterator[None]:
    """Operations of any kind while the block runs, also within ``same_bits``: for what changes no
    weights."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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


def or_in_any_order(work: Callable[[], T], stage: str, *, alone: bool) -> T:
    """``work`` within ``same_bits``; anew, and all that follows, in any order where torch refuses.

    Args:
        work: Begins from the start when it is called again.
        stage: Whose message it is.
        alone: Among several processes nothing is done anew: they are in the middle of exchanging
            weights, and ``same_bits`` ends them with a message.
    """
    try:
        return work()
    except RuntimeError as error:
        if not alone or _REFUSED not in str(error):
            raise
        message(stage, f"{str(error).split()[0]} adds in no fixed order: {NOT_TO_THE_BIT}")
    torch.use_deterministic_algorithms(False)
    return work()
