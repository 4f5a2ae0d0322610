"""How work is divided: a text into blocks of whole lines, and blocks among the tasks of ingest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 32 * 2**20
_LOOKED_AT_BYTES = 2**16

Span = tuple[int, int]
"""First byte, and one past the last."""
ReadAt = Callable[[int, int], bytes]
"""Bytes from a place on, at most so many."""


@dataclass(frozen=True)
class Shard:
    """One of several tasks that share the work; files and blocks are dealt out in turn."""

    number: int = 1
    """From 1."""
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def owns(self, file: int, block: int = 0) -> bool:
        """Whether a block of a file, both from 0, is this shard's."""
        return (file + block) % self.of == self.number - 1


def is_one_block(size: int) -> bool:
    """Whether a text of so many bytes is not divided."""
    return size <= BLOCK_BYTES


def spans(size: int, read: ReadAt) -> Iterator[Span]:
    """Parts of a text of ``size`` bytes, each of which ends with a line's end.

    Nothing is read but what follows after each ``BLOCK_BYTES``, up to a line's end.
    """
    start = 0
    while start < size:
        end = min(start + BLOCK_BYTES, size)
        while end < size and (chunk := read(end, _LOOKED_AT_BYTES)):
            newline = chunk.find(b"\n")
            end += len(chunk) if newline < 0 else newline + 1
            if newline >= 0:
                break
        yield start, end
        start = end


def file_spans(path: Path) -> list[Span]:
    """``spans`` of a file on this machine."""
    with path.open("rb") as file:
        number = file.fileno()
        return list(spans(path.stat().st_size, lambda start, n: os.pread(number, n, start)))
