"""Values written as Hydra overrides, so that no text of a user is taken for syntax."""

from __future__ import annotations

import json
import re
from os import PathLike, fspath
from typing import Any

_BEFORE_QUOTE = re.compile(r"(\\*)('|$)")


def override_value(value: Any) -> str:
    """``value`` in the grammar of overrides; strings and paths are quoted."""
    if isinstance(value, PathLike):
        value = fspath(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_value, value)) + "]"
    if isinstance(value, str):
        # Hydra reads a backslash as itself unless a quote follows
        escaped = _BEFORE_QUOTE.sub(_escape, value)
        return f"'{escaped}'"
    return json.dumps(value)


def _escape(found: re.Match[str]) -> str:
    slashes, quote = found.groups()
    return slashes * 2 + ("\\'" if quote else "")


def model_overrides(name: str) -> list[str]:
    """Overrides that choose a model: a name of ``config/model``, a hub id or a folder."""
    if set(name) & set("/:\\"):
        # not one of ours
        return ["model=blank_model", f"model.name_or_path={override_value(name)}"]
    return [f"model={override_value(name)}"]
