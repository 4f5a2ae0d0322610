"""``policy.pt``: a checkpoint as the DPO reference code writes it, {step_idx, state, metrics}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dpo.errors import ArtifactError, writing
from dpo.modeling.load import load_model


def export_policy(checkpoint: Path, output: Path, *, trust_remote_code: bool = False) -> Path:
    """Write ``output`` from one of our checkpoints; an adapter is added to its base first.

    ``model.archive=policy.pt`` reads it back, here and in the reference code; weights keep their
    type (those of a base with its adapter added are float32), tied ones are written under both
    names.

    Raises:
        ModelError: ``checkpoint`` is no model's folder.
        ArtifactError: ``output`` is a folder, or a file of the checkpoint.
    """
    if output.is_dir():
        raise ArtifactError(
            "a policy.pt is a file", where=str(output), fix="name a file: output=out/policy.pt"
        )
    if output.exists() and output.resolve().parent == checkpoint.resolve():
        raise ArtifactError(
            "a file of the checkpoint would be replaced",
            where=str(output),
            fix="name a file beside the checkpoint, or one that is not there yet",
        )
    model = load_model(checkpoint, _dtype(checkpoint), trust_remote_code=trust_remote_code)
    record = _record(checkpoint)
    metrics = {
        name: value
        for name, value in record.get("metrics", {}).items()
        if isinstance(value, int | float)
    }
    policy: dict[str, Any] = {
        "step_idx": int(record.get("examples") or 0),
        "state": dict(model.state_dict()),
        "metrics": metrics,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        # into a file of Python's: torch's own does not say that a disk is full
        with writing(output), partial.open("wb") as file:
            torch.save(policy, file)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return output


def _record(checkpoint: Path) -> dict[str, Any]:
    """What the run left beside the weights; nothing for a model of another program."""
    path = checkpoint / "run.json"
    if not path.is_file():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _dtype(checkpoint: Path) -> torch.dtype:
    path = checkpoint / "config.json"
    name = json.loads(path.read_text(encoding="utf-8")).get("dtype") if path.is_file() else None
    found = getattr(torch, str(name), None)
    return found if isinstance(found, torch.dtype) else torch.float32
