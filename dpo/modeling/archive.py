"""What ``model.archive`` names: a checkpoint folder, or a ``policy.pt`` of the reference code."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dpo.errors import ModelError
from dpo.modeling.stored import is_computed
from dpo.storage.model_folder import is_adapter


def checkpoint_folder(archive: Path) -> Path:
    """The checkpoint that ``model.archive`` names: a folder, or its ``LATEST/policy.pt`` of old.

    Raises:
        ModelError: there is none.
    """
    candidates = [archive, archive.parent] if archive.name == "policy.pt" else [archive]
    for candidate in candidates:
        for folder in (candidate, candidate / "LATEST"):
            if (folder / "config.json").is_file() or is_adapter(folder):
                return folder
    raise ModelError(
        "there is no checkpoint",
        where=f"model.archive={archive}",
        fix="give a policy.pt, a checkpoint folder, or its LATEST",
    )


def load_policy_file(model: Any, path: Path) -> None:
    """Weights of a ``policy.pt`` of the reference code: {step_idx, state, metrics}.

    Raises:
        ModelError: not such a file, or the weights of another architecture.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded["state"]
    except Exception as error:
        raise ModelError(
            f"not a policy.pt of the reference code: {_reason(error, path)}",
            where=str(path),
            fix="it must hold {step_idx, state, metrics}; only tensors and plain values are read",
        ) from None
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise _other_architecture(path, str(error).splitlines()[-1].strip()) from None
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    unexpected = [n for n in unexpected if not is_computed(n, state[n].shape)]
    if missing or unexpected:
        names = ", ".join((missing or unexpected)[:3])
        word = "missing" if missing else "unexpected"
        raise _other_architecture(path, f"{word} weights: {names}")


def _reason(error: Exception, path: Path) -> str:
    """What is wrong with a file, without torch's advice to read it in a way that runs its code."""
    if not path.stat().st_size:
        return "the file is empty"
    if isinstance(error, KeyError | TypeError):
        return "it holds no 'state'"
    if isinstance(error, UnpicklingError):
        return "it holds something else than tensors and plain values, or is no file of torch.save"
    if isinstance(error, RuntimeError | EOFError):
        return "the file is cut short or damaged"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _other_architecture(path: Path, detail: str) -> ModelError:
    return ModelError(
        f"the archive belongs to another model: {detail}",
        where=f"model.archive={path}",
        fix="choose the model= that it was trained from",
    )
