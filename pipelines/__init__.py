"""The pipeline, its compiled package, and how runs of it are started and watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.run import run_pipeline

__all__ = ["run_pipeline"]


def __getattr__(name: str) -> Any:
    """The programmatic API, imported when it is first used."""
    if name == "run_pipeline":
        from pipelines.run import run_pipeline

        return run_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
