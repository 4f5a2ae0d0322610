"""Preference fine-tuning: SFT, then DPO, conservative DPO or IPO, as steps that meet on disk."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.api import TrainingResult, run_training

__version__ = "0.1.0"
__all__ = ["TrainingResult", "__version__", "run_training"]


def __getattr__(name: str) -> Any:
    """The programmatic API, imported when it is first used: ``import dpo`` stays light."""
    if name in ("TrainingResult", "run_training"):
        # by name: no step runs it, so it must not look like an import of every step
        return getattr(importlib.import_module("dpo.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
