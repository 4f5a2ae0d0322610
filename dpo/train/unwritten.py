"""Why a checkpoint could not be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from dpo.errors import ArtifactError, DpoError

_FULL_BYTES = 1 << 20
"""A disk with less than this left counts as full."""


def explain(error: BaseException, folder: Path) -> DpoError:
    """Why a checkpoint could not be written, in our words."""
    if isinstance(error, DpoError):
        return error
    causes = [one[0] for one in getattr(error, "failures", {}).values()] or [error]
    reason = " ".join(str(causes[0]).split())
    # torch's writer does not say why it failed
    full = "No space left" in reason or _is_full(folder)
    return ArtifactError(
        f"a checkpoint could not be written: {'the disk is full' if full else reason[-300:]}",
        where=str(folder),
        fix="free space" if full else "see the reason; keep_checkpoints=1 needs least space",
    )


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _FULL_BYTES
    except OSError:
        # the folder is gone, or none
        return False
