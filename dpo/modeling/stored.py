"""Whether a model's files hold the weights that its ``config.json`` describes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from dpo.errors import ModelError

_log = logging.getLogger(__name__)
_MASK = (".attention.bias", ".attn.bias")
_MASK_DIMENSIONS = 4
_NORM = re.compile(r"norm|^ln_", re.IGNORECASE)
_NAMED = 3
"""How many names a warning tells."""
_COMPUTED = ("masked_bias", "_mask", "inv_freq", "_cached", "position_ids", "k_scale", "v_scale")
"""Ends of the names of masks and angles, and of scales that servers keep keys and values with."""


def is_computed(name: str, shape: Sequence[int] | None) -> bool:
    """Whether it is no weight: older versions of transformers stored what newer ones compute.

    Args:
        name: Its name in the file.
        shape: Its shape, as far as it is known.
    """
    mask = name.endswith(_MASK) and (shape is None or len(shape) == _MASK_DIMENSIONS)
    return mask or name.endswith(_COMPUTED)


def check_names(model: Any, found: dict[str, Any], folder: Path) -> None:
    """transformers fills weights that a file lacks with random numbers, leaves out those that the
    model has no place for, and goes on.

    Args:
        model: The model as it was loaded.
        found: What transformers says of its loading.
        folder: Where from.

    Raises:
        ModelError: a weight is missing, or one is left over that shows another body.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(set(found.get("missing_keys", ())) - tied)
    missing += sorted(str(item[0]) for item in found.get("mismatched_keys", ()))
    if missing:
        raise _lacking(missing, model, folder)
    names = found.get("unexpected_keys", ())
    shapes = _shapes(folder) if names else {}
    unused = sorted(name for name in names if not is_computed(name, shapes.get(name)))
    modules = dict(model.named_modules())
    if body := [name for name in unused if _is_of_the_body(modules, name, model)]:
        raise _other_weights(
            f"hold {body[0]}{_more(body)}, for which the model that config.json describes has no "
            "place",
            folder,
        )
    if unused:
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        _log.warning(
            "%s: left out, as the language model has no such part: %s%s",
            *(folder, ", ".join(unused[:_NAMED]), more),
        )


def _lacking(names: Sequence[str], model: Any, folder: Path) -> ModelError:
    kinds = getattr(model.config, "architectures", None) or ()
    if kinds and type(model).__name__ not in kinds:
        # a reward model has another head, a bare body has none
        return ModelError(
            f"config.json describes a {kinds[0]}, whose weights lack {names[0]}{_more(names)} of a "
            f"{type(model).__name__}",
            where=str(folder),
            fix="give the folder of a causal language model of transformers",
        )
    return _other_weights(
        f"lack {names[0]} in the shape that config.json describes{_more(names)}", folder
    )


def _other_weights(problem: str, folder: Path) -> ModelError:
    return ModelError(
        f"the files of weights {problem}",
        where=str(folder),
        fix="config.json and weights belong to different models: fetch the model again",
    )


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _is_of_the_body(modules: dict[str, nn.Module], name: str, model: Any) -> bool:
    """Whether the values would be others with it; not so of another head, a pooler or a tower.

    In one of the blocks or beside them as one more; in a layer that the model has (a bias); or a
    norm between its parts.
    """
    prefix = f"{model.base_model_prefix}."
    # files of the part without a head have names without its prefix
    full = name if name.partition(".")[0] in dict(model.named_children()) else prefix + name
    parts = full.split(".")[:-1]
    above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    if any(isinstance(modules.get(place), nn.ModuleList) for place in above):
        return True
    layer = modules.get(above[-1])
    if layer is not None:
        return any(True for _ in layer.parameters(recurse=False))
    return len(above) > 1 and above[-2] in modules and bool(_NORM.search(parts[-1]))
