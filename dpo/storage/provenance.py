"""What made an artifact: version of the code, image, machine, and fingerprints of what was read.

Equal runs give equal bytes on one processor type, lock file and number of processes; so these are
recorded. None of it is part of a content hash.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from dpo.config.places import lock_file

IMAGE = "DPO_IMAGE"
"""Environment variable with the reference of the image, by digest, that a step runs in."""
COMMIT = "DPO_COMMIT"
"""Environment variable with the commit that an image was built from."""
_GIT_SECONDS = 10.0

_noted: dict[str, str] = {}


def note(fingerprints: dict[str, str]) -> None:
    """Fingerprints of data, base model and code that this process works with."""
    _noted.clear()
    _noted.update(fingerprints)


def made_by() -> dict[str, Any]:
    """Of this process, now."""
    return {
        **_constant(),
        "image": os.environ.get(IMAGE, ""),
        "processor": _processor(),
        "processes": int(os.environ.get("WORLD_SIZE") or 1),
        "fingerprints": dict(_noted),
    }


@cache
def _constant() -> dict[str, str]:
    from dpo import __version__

    lock = lock_file()
    return {
        "version": __version__,
        "commit": os.environ.get(COMMIT) or _commit(),
        "lock_sha256": hashlib.sha256(lock.read_bytes()).hexdigest() if lock else "",
        "python": platform.python_version(),
    }


def _commit() -> str:
    """Of a checkout, marked where files differ from it; empty elsewhere."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(  # nosec B607
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return _cpu()


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
