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
from dpo.storage.base_model import PACKAGED_ID
from dpo.storage.manifest import Manifest, record

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
    return _named(_root(manifest))


def hub_model(manifest: Manifest) -> bool | None:
    """Whether the model at the root came from the hub; None where no fingerprint was recorded.

    A name alone does not tell: there may be a folder of that name, on one machine and not on
    another.
    """
    root = _root(manifest)
    print_ = str(((root.get("made_by") or {}).get("fingerprints") or {}).get("model") or "")
    # that of a model of the hub names its commit; the one that a package holds has a folder's hash
    name = _named(root)
    return name == PACKAGED_ID or print_.startswith(f"{name}@") if print_ else None


def _root(manifest: Manifest) -> Mapping[str, Any]:
    """The record of the first step of a checkpoint's lineage; empty where it is not reached."""
    found: Mapping[str, Any] = record(manifest)
    while manifest.lineage:
        parents = found.get("parents", {})
        if not (parent := parents.get("base") or parents.get("policy")):
            break
        found = manifest.lineage.get(parent, {})
    return found


def _named(root: Mapping[str, Any]) -> str:
    return str(((root.get("configuration") or {}).get("model") or {}).get("name_or_path") or "")
