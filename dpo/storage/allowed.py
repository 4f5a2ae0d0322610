"""Which places a run may read from: everything, or what the operator's allow list names.

A pipeline runs with the operator's credentials, so whoever fills in its form could have it read
what the credentials can read. ``DPO_ALLOWED_SOURCES`` narrows that: places with commas between
them, each a store's URL (``s3://bucket/prefix``, ``gs://...``), a folder (``/data``,
``file:///data``) or an owner or data set of the hub (``hf://owner``). What lies below a named place
may be read, nothing else. ``DPO_ALLOWED_MODELS`` does the same for base models and tokenizers.
What travels with the package is always allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dpo.config.places import BUILTIN_PREFIX
from dpo.errors import ConfigError

SOURCES = "DPO_ALLOWED_SOURCES"
MODELS = "DPO_ALLOWED_MODELS"
_GLOB = re.compile(r"[*?\[]")


def allow_list(variable: str = SOURCES) -> list[str]:
    """The places that the operator named; empty where there is no list."""
    return [item.strip() for item in os.environ.get(variable, "").split(",") if item.strip()]


def check_allowed(place: str | Path, where: str, variable: str = SOURCES) -> None:
    """Refuse a place that is not on the allow list, where there is one.

    Args:
        place: URL, folder, file or glob.
        where: The setting that names it, for the message.
        variable: Whose list.

    Raises:
        ConfigError: it lies outside of all that is listed.
    """
    if variable not in os.environ or str(place).startswith(BUILTIN_PREFIX):
        return
    if not is_below(str(place), allow_list(variable)):
        raise ConfigError(
            "this place is not on the list of those that runs may read",
            where=where,
            fix=f"choose one below a place that {variable} names; whoever operates the pipeline "
            "may add to it",
        )


def is_below(place: str, allowed: Iterable[str]) -> bool:
    """Whether ``place`` is one of these places or lies below one, whatever it looks like."""
    parts = _parts(place)
    return parts is not None and any(
        parts[: len(other)] == other for other in map(_parts, allowed) if other
    )


def _parts(place: str) -> tuple[str, ...] | None:
    """Scheme and path, part by part; None for what is no place or leads upwards."""
    scheme, separator, rest = place.partition("://")
    scheme = scheme.lower()
    if not separator or scheme == "file":
        return ("file", *_folder(place, is_url=bool(separator)).parts)
    if scheme == "hf":
        rest = rest.removeprefix("datasets/")
    names = [name for name in rest.split("/") if name]
    # a store takes names as they are; a proxy before it may not
    if not names or any(unquote(name) in (".", "..") or "\\" in name for name in names):
        return None
    return ("s3" if scheme == "minio" else scheme, *names)


def _folder(place: str, *, is_url: bool) -> Path:
    """A path with links and ``..`` resolved, as far as it is not a glob."""
    path = Path(unquote(urlsplit(place).path) if is_url else place).expanduser()
    fixed = Path(path.anchor)
    for number, part in enumerate(path.parts[1:] if path.anchor else path.parts):
        if _GLOB.search(part) and not (fixed / part).exists():
            left = path.parts[number + (1 if path.anchor else 0) :]
            # a step upwards inside a glob cannot be followed here: it is none of ours
            return Path("/..") if ".." in left else fixed.resolve().joinpath(*left)
        fixed = fixed / part
    return fixed.resolve()
