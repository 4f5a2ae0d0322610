"""Values written as Hydra overrides, so that no text of a user is taken for syntax."""

from __future__ import annotations

import json
import re
from os import PathLike, fspath
from typing import Any

_INTERPOLATION = re.compile(r"(\\*)\$\{")
_QUOTE = re.compile(r"(\\*)('|$)")


def override_value(value: Any) -> str:
    """``value`` in the grammar of overrides; strings and paths are quoted."""
    if isinstance(value, PathLike):
        value = fspath(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(override_value, value)) + "]"
    if isinstance(value, str):
        # backslashes are literal but before a quote, the end or ``${``, where they are doubled
        plain = _INTERPOLATION.sub(lambda found: found[1] * 2 + "\\${", value)
        quoted = _QUOTE.sub(lambda found: found[1] * 2 + ("\\'" if found[2] else ""), plain)
        return f"'{quoted}'"
    return json.dumps(value)


def parsed_value(text: str) -> Any:
    """The value that ``text`` stands for in the grammar of overrides; itself where it is none."""
    # not for all who import dpo: Hydra takes longer to load than the rest
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return text


def unquoted(text: str) -> str:
    """Without the quotes around all of it."""
    value = parsed_value(text) if text.startswith(("'", '"')) else text
    return value if isinstance(value, str) else text


def model_overrides(name: str) -> list[str]:
    """Overrides that choose a model: a name of ``config/model``, a hub id or a folder."""
    if set(name) & set("/:\\"):
        # not one of ours
        return ["model=blank_model", f"model.name_or_path={override_value(name)}"]
    return [f"model={override_value(name)}"]
