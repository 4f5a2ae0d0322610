"""Where the outputs of a run lie, for a later run that starts from them; and where a model began.

Kubeflow's run API tells no URI of an artifact and they cannot be derived, so the evaluation, which
reads all of them, notes them beside its own output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.errors import DpoError
from dpo.storage.manifest import Manifest

SFT_CHECKPOINT = "sft-checkpoint-"
"""Begins the base's name in a published adapter that was trained on an SFT model; that model's
content hash follows."""
FILE = "sources.json"
"""Not part of the output's content: the same evaluation may come from other places."""


def note_sources(folder: Path, uris: Mapping[str, str]) -> None:
    """Write the URI of each step's output beside a complete evaluation."""
    text = json.dumps(dict(uris), indent=1, sort_keys=True)
    (folder / FILE).write_text(text, encoding="utf-8")


def read_sources(folder: Path) -> dict[str, str]:
    """The URI of each step's output; empty where nobody noted them."""
    path = folder / FILE
    if not path.is_file():
        return {}
    return {str(name): str(uri) for name, uri in json.loads(path.read_text("utf-8")).items()}


def check_base(trained_on: str, base: Path, found: str, error: type[DpoError]) -> None:
    """Refuse a base that has changed since an adapter was trained on it.

    Args:
        trained_on: Content hash that the adapter's manifest has; empty where none is known.
        base: Folder of the base.
        found: Its content hash now.
        error: What to raise.
    """
    if trained_on and trained_on != found:
        raise error(
            f"the adapter was trained on other weights ({trained_on[:12]}) than its base has now "
            f"({found[:12]})",
            where=str(base),
            fix="train the adapter again, or put back the checkpoint that it was trained on",
        )


def base_model(manifest: Manifest) -> str:
    """Hub id or folder of the model at the root of a checkpoint's lineage; empty where none tells.

    The checkpoint's own settings say what its run was asked for, which need not be what the
    checkpoint that it started from had been made of.
    """
    settings: Mapping[str, Any] = manifest.settings
    parents: Mapping[str, str] = manifest.inputs
    while manifest.lineage and (parent := parents.get("base") or parents.get("policy")):
        record = manifest.lineage.get(parent, {})
        settings, parents = record.get("configuration", {}), record.get("parents", {})
    return str((settings.get("model") or {}).get("name_or_path") or "")
