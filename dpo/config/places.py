"""Where things are: what travels with the package, and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_REPOSITORY = _PACKAGE.parent
_SHIPPED = _PACKAGE / "_shipped"

BUILTIN_PREFIX = "builtin:"
_BUILTINS = {
    "builtin:tiny": _PACKAGE / "modeling" / "tiny",
    "builtin:hh-harmless": _PACKAGE / "data" / "bundled" / "hh-harmless.jsonl.gz",
}


def config_dir() -> Path:
    """The shipped configuration: inside an installed package, or ``config/`` of a checkout."""
    shipped = _SHIPPED / "config"
    return shipped if shipped.is_dir() else _REPOSITORY / "config"


def lock_file() -> Path | None:
    """The lock file that this code was tested with, if it is there."""
    for path in (_SHIPPED / "requirements.lock", _REPOSITORY / "images" / "requirements.lock"):
        if path.is_file():
            return path
    return None


def packaged_model_lock() -> Path:
    """The pinned package that holds SmolLM2."""
    shipped = _SHIPPED / "smollm2.lock"
    return shipped if shipped.is_file() else _REPOSITORY / "images" / "smollm2.lock"


def builtin(name: str) -> Path | None:
    """The file or folder behind ``builtin:NAME``; None for any other name."""
    return _BUILTINS.get(name)


def builtins() -> list[str]:
    """All names that ``builtin`` knows."""
    return sorted(_BUILTINS)


def chat_templates() -> dict[str, Path]:
    """The packaged chat templates, by name."""
    folder = _PACKAGE / "data" / "templates" / "chat"
    return {path.stem: path for path in sorted(folder.glob("*.jinja"))}


def cache_dir() -> Path:
    """``DPO_CACHE_DIR``, else ``dpo`` in the user's cache folder: models and servers, once."""
    if chosen := os.environ.get("DPO_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo"


def tokens_dir() -> Path:
    """``DPO_TOKENS_DIR``, else ``tokens`` in the cache: token ids of the texts of pairs."""
    chosen = os.environ.get("DPO_TOKENS_DIR")
    return Path(chosen).expanduser() if chosen else cache_dir() / "tokens"
