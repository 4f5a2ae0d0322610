"""The configuration of a model, found without the hub: its sizes, no weights.

Shapes of the shipped ``model=`` choices stand in ``architectures.json`` (the fields of their
``config.json`` on the hub), so nothing is downloaded; any folder with a ``config.json`` is read.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from dpo.config.models import ModelConfig
from dpo.config.places import BUILTIN_PREFIX, builtin
from dpo.errors import ModelError
from dpo.plan.shape import Architecture
from dpo.plan.sizes import from_config
from dpo.storage.base_model import PACKAGED_ID, packaged_folder


def config_values(model: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model that is known or here; no network is used.

    Raises:
        ModelError: the model is neither shipped nor a folder with a ``config.json``.
    """
    name = model.name_or_path
    folder = builtin(name) if name.startswith(BUILTIN_PREFIX) else Path(name).expanduser()
    candidates = [folder, packaged_folder() if name == PACKAGED_ID else None, _in_hub_cache(name)]
    for place in candidates:
        if place is not None and (place / "config.json").is_file():
            return _read(place / "config.json")
    if name in _shipped():
        return _shipped()[name]
    raise ModelError(
        f"the architecture of {name or 'the model'} is not known without the hub",
        where="model.name_or_path",
        fix="give the folder of a model (its config.json is enough), fetch it once with `dpo fetch "
        f"model=...`, or one of {', '.join(_shipped())}",
    )


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture of a configured model, without network and weights.

    Raises:
        ModelError: it is not known here, or its ``config.json`` describes no such model.
    """
    return from_config(config_values(model))


@cache
def _shipped() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("architectures.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"config.json is not JSON: {error}", where=str(path), fix="fetch the model again"
        ) from None
    if not isinstance(values, dict):
        raise ModelError("config.json is not a JSON object", where=str(path))
    return values


def _in_hub_cache(name: str) -> Path | None:
    """The newest snapshot of a hub model that was downloaded before."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return None
    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None
