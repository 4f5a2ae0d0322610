"""The model that a step is given: an output of our steps, or a Hugging Face folder of anybody.

A folder of ours has a manifest, and its files are compared with it. Any other one (of the hub, of
another trainer, a published version that was fetched) is looked at as far as loading reads it:
whole weights, configuration, tokenizer. Its content hash is that of these files, and of an
adapter's base, so that what is made from it can tell later which model that was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.config.models import ModelConfig
from dpo.errors import ArtifactError, ModelError, OutputGone
from dpo.storage.base_model import local_model
from dpo.storage.fingerprint import visible_files
from dpo.storage.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    content_hash,
    hashed,
    lineage_of,
    read_manifest,
    remember,
    verify_files,
)
from dpo.storage.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_of,
    check_adapter,
    check_folder,
    is_adapter,
    weight_files,
)
from dpo.storage.progress import message
from dpo.storage.published import as_manifest
from dpo.storage.trusted import find_version

FOREIGN = "model"
"""The ``stage`` of a model that none of our steps made."""
TRAINED = ("sft", "preference")
"""Steps that leave a record of the training beside the model."""
_OURS = (*TRAINED, "base model")
"""Whose outputs are models."""
_READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")
"""What loading may read beside the weights."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The one folder that is read beside them."""
_NOT_READ = frozenset(
    {MANIFEST, "trainer_state.json", "run.json", "requirements.txt"}
    # of LLaMA-Factory and axolotl
    | {"running_log.txt", "tokens_state.json"}
)
_NOT_READ_ENDS = ("_results.json", ".index.json", "LICENSE.txt")
_MOST_BESIDE_BYTES = 16 << 20
"""Of a card and a licence; checkpoints and optimisers, which take minutes to read, are larger."""
_SAID_FROM_BYTES = 4 << 30
_TOKENIZERS = ("tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")

_known: dict[tuple[tuple[Path, int, int], ...], tuple[FileEntry, ...]] = {}
"""What this process read, by path, size and time of change."""


def read_model(
    folder: Path, name: str = "model", *, verify: bool = True, needs_tokenizer: bool = True
) -> Manifest:
    """The manifest of a model's folder; of a foreign one what its manifest would be.

    Args:
        folder: Any model's.
        name: What the step calls this input, for messages.
        verify: Compare an output of ours with its manifest. A foreign folder is read in any case:
            nothing else tells what it holds.
        needs_tokenizer: Whether one must be in a foreign folder.

    Raises:
        ArtifactError: there is no such folder, it is the output of another step, or a file of it
            is missing or differs from its manifest.
        ModelError: no whole model with a tokenizer.
    """
    if not folder.is_dir():
        raise OutputGone(
            f"there is no such folder for {name}",
            where=str(folder),
            fix="name the folder of a model: the output of a training step, or any Hugging Face "
            "folder; a model of the hub is given as model=",
        )
    values = _own_manifest(folder)
    if values is None:
        return _foreign(folder, name, needs_tokenizer=needs_tokenizer)
    if "stage" not in values:
        return _published(folder, verify=verify)
    manifest = read_manifest(folder, verify=verify)
    if manifest.stage not in _OURS:
        raise ArtifactError(
            f"{name} must be a model, and this is the output of step {manifest.stage}",
            where=str(folder),
            fix="pass the output of a training step, or any Hugging Face folder",
        )
    return manifest


def adapter_base_folder(folder: Path) -> Path:
    """The folder of an adapter's base: a checkpoint, or a model as ``name_or_path`` names it.

    Raises:
        ModelError: it cannot be had.
    """
    base = base_of(folder)
    if is_adapter(Path(base)):
        return Path(base)
    try:
        return local_model(ModelConfig(name_or_path=base))
    except ModelError as error:
        raise ModelError(
            f"the adapter's base model {base} cannot be had: {error.found}",
            where=str(folder / ADAPTER_CONFIG),
            fix="correct base_model_name_or_path in it; lora.save=merged needs no base",
        ) from None


def _own_manifest(folder: Path) -> dict[str, Any] | None:
    """What a manifest of ours says; None without one: other programs name files so as well."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        # a damaged one, which is told of by who reads it
        return {"stage": ""}
    ours = isinstance(values, dict) and {"content_hash", "files"} <= set(values)
    return values if ours else None


def _published(folder: Path, *, verify: bool) -> Manifest:
    manifest = as_manifest(find_version(folder.resolve().as_uri()).manifest)
    if verify:
        verify_files(folder, manifest)
    return remember(manifest)


def _foreign(folder: Path, name: str, *, needs_tokenizer: bool) -> Manifest:
    inputs = {}
    if is_adapter(folder):
        check_adapter(folder)
        base = adapter_base_folder(folder)
        # part of the hash: the same adapter on other weights is another model
        inputs["base"] = read_model(base, "its base", needs_tokenizer=False).content_hash
    elif (folder / "config.json").is_file():
        check_folder(folder)
    else:
        raise _no_model(folder, name)
    if needs_tokenizer and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise ModelError(
            f"{name} has no tokenizer",
            where=str(folder),
            fix="put the tokenizer's files beside the weights: tokenizer.save_pretrained(folder)",
        )
    entries = _entries(folder, name)
    return remember(
        Manifest(
            stage=FOREIGN,
            files=entries,
            content_hash=content_hash({**{e.path: e.sha256 for e in entries}, **inputs}),
            inputs=inputs,
            # an adapter's base may be of our steps
            lineage=lineage_of(inputs),
            made_by={"fingerprints": {"model": _whole(folder, entries)}},
            details={"sources": {"folder": folder.resolve().name, **_told(folder)}},
        )
    )


def _entries(folder: Path, name: str) -> tuple[FileEntry, ...]:
    """The files with their hashes; those that did not change are read once by a process."""
    paths = _files(folder)
    states = [(path, path.stat()) for path in paths]
    key = tuple((path.absolute(), state.st_size, state.st_mtime_ns) for path, state in states)
    if key not in _known:
        size = sum(state.st_size for _, state in states)
        if size >= _SAID_FROM_BYTES:
            # from a store that is mounted it takes minutes
            message(name, f"{name}: reading {size / 2**30:.0f} GiB to tell which model it is")
        _known[key] = tuple(hashed(folder, paths))
    return _known[key]


def _files(folder: Path) -> list[Path]:
    """What loading reads: nothing of what other trainers leave beside it, such as checkpoints."""
    beside = {
        path
        for pattern in _READ
        for path in folder.glob(pattern)
        if path.is_file() and path.name not in _NOT_READ and not path.name.endswith(_NOT_READ_ENDS)
    }
    templates = (folder / CHAT_TEMPLATES).glob("*.jinja")
    adapter = folder.glob(ADAPTER_WEIGHTS)
    return sorted({*beside, *templates, *(adapter if is_adapter(folder) else weight_files(folder))})


def _whole(folder: Path, entries: Sequence[FileEntry]) -> str:
    """Hash of its files: of a version that was pulled it is the version's, by which `dpo forget`
    finds what is made of it. Empty where more lies there than beside any version."""
    known = {entry.path: entry.sha256 for entry in entries}
    rest = [p for p in visible_files(folder) if p.relative_to(folder).as_posix() not in known]
    if sum(p.stat().st_size for p in rest) > _MOST_BESIDE_BYTES:
        return ""
    return content_hash(known | {entry.path: entry.sha256 for entry in hashed(folder, rest)})


def _told(folder: Path) -> dict[str, str]:
    """What its configuration says of kind and type of the weights."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    dtype = values.get("dtype") or values.get("torch_dtype")
    found = {"model_type": values.get("model_type"), "dtype": dtype}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _no_model(folder: Path, name: str) -> ModelError:
    """Says what is there instead."""
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    inner += sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inner:
        found = f"it holds folders of models ({', '.join(inner[:4])})"
        fix = f"name one of them, such as {folder / inner[-1]}"
    elif ggufs := sorted(path.name for path in folder.glob("*.gguf")):
        found = f"{ggufs[0]} is made for inference, and is not loaded"
        fix = "give the Hugging Face folder that it was made from (config.json, *.safetensors)"
    else:
        found = "config.json is missing"
        fix = "give a folder with config.json, weights and tokenizer"
    return ModelError(f"{name} is no model's folder: {found}", where=str(folder), fix=fix)
