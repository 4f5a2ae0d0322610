"""LoRA adapters: merged into their base without torch, or published alone.

W' = W + s B A, with s = alpha / r (alpha / sqrt(r) when rank-stabilised); B is [out, r], A is
[r, in] (Hu et al., 2021, arXiv:2106.09685, section 4.1). It is computed in float32 and rounded to
the type of W, tensor by tensor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo.errors import ArtifactError
from dpo.publish.tensors import Tensor, model_tensors, read_tensors, write_model
from dpo.storage.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS

CONFIG, WEIGHTS = ADAPTER_CONFIG, ADAPTER_WEIGHTS
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    *("use_dora", "modules_to_save", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("layer_replication", "arrow_config", "monteclora_config"),
)
_LEAVE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights``. With others (PiSSA, OLoRA, LoftQ ...) opening the adapter
changes the base's weights first."""
_FLOATS: dict[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Change:
    """What is added to one weight."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    """The weight is [in, out], as in GPT-2's Conv1D."""

    def added(self) -> Matrix:
        delta = self.scale * (to_float(self.b) @ to_float(self.a))
        return delta.T if self.transposed else delta


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        ArtifactError: it cannot be read, or is not of a LoRA adapter.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{CONFIG} cannot be read: {error}", where=str(folder), fix="run the training again"
        ) from None
    if kind != "LORA":
        raise ArtifactError(
            f"the adapter is a {kind}, not LORA", where=str(folder / CONFIG), fix="train with LoRA"
        )
    return config


def merge(folder: Path, base: Path, target: Path, max_bytes: int) -> list[Path]:
    """Write the weights of ``base`` with the adapter in ``folder`` added; returns the files.

    Raises:
        ArtifactError: the adapter does not fit the base, or is of a kind that cannot be merged.
    """
    config = read_config(folder)
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if (start := config.get("init_lora_weights")) not in _LEAVE_BASE:
        unsupported.append(f"init_lora_weights={start}")
    if unsupported:
        raise ArtifactError(
            f"an adapter with {unsupported[0]} cannot be merged here",
            where=str(folder / CONFIG),
            fix="publish it alone with publish.lora=adapter",
        )
    weights = model_tensors(base)
    changes = _changes(folder, config)
    if missing := sorted(set(changes) - set(weights)):
        raise ArtifactError(
            f"the adapter changes {missing[0]}, which its base does not have",
            where=str(base),
            fix="give the base that the adapter was trained on",
        )
    for name, change in changes.items():
        _check_shapes(weights[name], change)

    def bytes_of(tensor: Tensor) -> Iterator[bytes]:
        if (change := changes.get(tensor.name)) is None:
            yield from tensor.pieces()
        else:
            yield from_float(to_float(tensor) + change.added(), tensor.dtype)

    return write_model(target, list(weights.values()), max_bytes, bytes_of)


def _changes(folder: Path, config: dict[str, Any]) -> dict[str, _Change]:
    tensors = read_tensors(folder / WEIGHTS)
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            if not name.endswith(".lora_B.weight"):
                raise ArtifactError(
                    f"{name} of the adapter cannot be merged",
                    where=str(folder / WEIGHTS),
                    fix="publish it alone with publish.lora=adapter",
                )
            continue
        module = name.removesuffix(".lora_A.weight")
        b = tensors.get(f"{module}.lora_B.weight")
        if b is None:
            raise ArtifactError(
                f"{module} has no lora_B", where=str(folder / WEIGHTS), fix="train again"
            )
        module = module.removeprefix(_PREFIX)
        scale = _scale(config, module)
        found[f"{module}.weight"] = _Change(a, b, scale, bool(config.get("fan_in_fan_out")))
    return found


def _scale(config: dict[str, Any], module: str) -> float:
    rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of_pattern(patterns: dict[str, Any] | None, module: str, usual: Any) -> Any:
    """The value of the first regular expression that a module's name ends with, as in peft."""
    found = (v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, usual)


def _check_shapes(weight: Tensor, change: _Change) -> None:
    wanted = (change.b.shape[0], change.a.shape[1])
    if change.transposed:
        wanted = wanted[::-1]
    if weight.shape != wanted:
        raise ArtifactError(
            f"{weight.name} is {list(weight.shape)}, the adapter's change is {list(wanted)}",
            where=str(change.a.path),
            fix="give the base that the adapter was trained on",
        )


def to_float(tensor: Tensor) -> Matrix:
    """A tensor's values as float32.

    Raises:
        ArtifactError: it holds no floating-point numbers.
    """
    data = b"".join(tensor.pieces())
    if tensor.dtype == "BF16":
        # bfloat16 is the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif tensor.dtype in _FLOATS:
        values = np.frombuffer(data, _FLOATS[tensor.dtype]).astype(np.float32)
    else:
        raise ArtifactError(
            f"{tensor.name} is {tensor.dtype}: no adapter can be added to it",
            where=str(tensor.path),
            fix="publish it alone with publish.lora=adapter",
        )
    return values.reshape(tensor.shape)


def from_float(values: Matrix, dtype: str) -> bytes:
    """The bytes of float32 values as ``dtype``, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(_FLOATS[dtype]).tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def alone(config: dict[str, Any], base: str) -> dict[str, Any]:
    """The adapter's configuration with ``base`` as its base, and no path of this machine."""
    return {**config, "base_model_name_or_path": base, "inference_mode": True}
