"""The bytes behind a column of texts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def buffer_of(texts: pa.Array) -> tuple[bytes, npt.NDArray[np.int32]]:
    """(the bytes of all texts, the end of each)."""
    offsets = np.frombuffer(texts.buffers()[1], dtype=np.int32)
    offsets = offsets[texts.offset : texts.offset + len(texts) + 1]
    data = texts.buffers()[2]
    raw = b"" if data is None else data.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    return bytes(raw), offsets[1:] - offsets[0]
