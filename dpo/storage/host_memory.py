"""Keeps a process from giving memory back to the system that it needs again at once."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
VARIABLES = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""What a training process is started with: one heap for all threads, those of libraries too that
start theirs while they are imported; and large pages for that heap, each of which is cleared at
once instead of 512 times 4 KiB. torch's own way to large pages (``THP_MEM_ALLOC_ENABLE``) aligns
large tensors to 2 MiB, which leaves holes: pages were cleared in every step, memory grew, and glibc
looked longer for room."""


def prepare() -> None:
    """For a process that may train: call it before torch is imported; the user's settings win.

    Processes that it starts inherit the variables. (Large pages are theirs alone: glibc reads its
    tunables when a process starts.)
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed memory; once per process, False where there is no glibc.

    A training step allocates and frees gigabytes of activations. glibc gives them back at the end
    of each step, and the kernel then clears every page again: 8 to 12 % of a step's time, measured.
    Kept, memory is as large as the largest step needed, which the system would have had to give
    anyway. The same holds for the megabytes of each piece that ingest checks.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # no mapping of its own for a large block, and no trimming of the heap
    kept = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    # one heap for all threads: those of other threads are given back whatever is asked for
    return bool(kept and mallopt(_M_ARENA_MAX, 1))
