"""A GPU whose memory is full, as a message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dpo.errors import TrainingError


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn torch's error of a full GPU into ours; use it with ``with`` or as a decorator.

    Raises:
        TrainingError: the memory of a GPU is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = " ".join(str(error).split()).partition(" GPU ")[0].removesuffix(".")
        raise TrainingError(
            f"the memory of the GPU is full: {first}",
            fix="set a smaller micro_batch_tokens, or activation_checkpointing=full; `dpo plan` "
            "says what fits",
        ) from None
