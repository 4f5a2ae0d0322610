"""Checked blocks in the order of the input, and where each of their pairs stands."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo.data.check import Block
from dpo.data.spill import Tally


@dataclass
class Part:
    """A checked block and its place in the whole."""

    block: Block
    tally: Tally
    line_offset: int
    """Lines of the file before the block."""


class Places:
    """Where pairs stand, by their ordinal."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends: list[int] = []
        for part in parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + part.tally.pairs)

    def place(self, ordinal: int, line: int) -> str:
        """File and line of a pair, which is on ``line`` of its block."""
        part = self._parts[bisect_right(self._ends, ordinal)]
        return f"{part.block.place.file}, line {line + part.line_offset}"

    def other(self, decision: Any) -> str:
        """The place of the pair that a ``repeats.DECISION`` names as the other one."""
        return self.place(int(decision["other"]), int(decision["other_line"]))

    def both(self, decision: Any) -> str:
        """Both places of a ``repeats.DECISION``."""
        own = self.place(int(decision["ordinal"]), int(decision["line"]))
        return f"{own} is like {self.other(decision)}"
