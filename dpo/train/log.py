"""The metric log: one JSON line for each optimiser step and each evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricLog:
    """Appends lines to ``metrics.jsonl``; each is whole on disk before the next step begins."""

    def __init__(self, folder: Path, *, begin: Path | None = None) -> None:
        self.path = folder / FILE
        if begin is not None:
            # a resumed run: its lines so far, without those of steps that are done again
            shutil.copyfile(begin, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """One line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()
