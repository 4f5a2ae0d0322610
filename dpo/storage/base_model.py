"""Where a base model comes from, and a fingerprint of it, without torch.

builtin:NAME    travels with this package
a folder        a Hugging Face directory
org/name        the hub, at a commit; SmolLM2-135M-Instruct also from a Python package, converted
                once into the user's cache (``dpo.modeling.obtain``)
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dpo.config.models import ModelConfig
from dpo.config.places import BUILTIN_PREFIX, builtin, builtins, cache_dir
from dpo.errors import ModelError
from dpo.storage.allowed import MODELS, check_allowed
from dpo.storage.fingerprint import path_fingerprint, visible_files
from dpo.storage.manifest import MANIFEST, read_manifest, write_atomically

PACKAGED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that a Python package holds as well."""
_HUB_TIMEOUT_SECONDS = 10.0
TOKENIZER_FILES = [
    *("tokenizer*", "special_tokens_map.json", "*.jinja", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "tokenization*.py"),
]
"""Patterns of the names that tokenizers' files have."""
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py"]


def packaged_folder() -> Path:
    """Where the converted ``PACKAGED_ID`` is kept."""
    return cache_dir() / "models" / PACKAGED_ID.rpartition("/")[2]


def local_model(model: ModelConfig) -> Path:
    """A folder to load the base model from; downloads from the hub where that is its place.

    Raises:
        ModelError: it is nowhere, or not a model's folder.
    """
    name = model.name_or_path
    folder = _without_network(name)
    if folder is None:
        folder = _from_hub(model)
    if not (folder / "config.json").is_file():
        raise ModelError(
            "not a Hugging Face model folder: config.json is missing",
            where=str(folder),
            fix="give model.name_or_path a folder with config.json, weights and tokenizer",
        )
    return folder


def is_here(model: ModelConfig) -> bool:
    """Whether the model can be loaded without a network.

    Raises:
        ModelError: it names a folder or a packaged model that does not exist.
    """
    return _without_network(model.name_or_path) is not None


def local_tokenizer(model: ModelConfig) -> Path:
    """A folder with the tokenizer; of a hub model its tokenizer files alone are fetched.

    Raises:
        ModelError: it is nowhere.
    """
    wanted = _of_tokenizer(model) or model
    # the model's kind tells the tokenizer's class where its own files do not
    files = [*TOKENIZER_FILES, "config.json"]
    return _without_network(wanted.name_or_path) or _from_hub(wanted, files)


def _of_tokenizer(model: ModelConfig) -> ModelConfig | None:
    """The model whose tokenizer is used, where it is another one; the revision is not its."""
    if model.tokenizer_name_or_path in (None, "", model.name_or_path):
        return None
    changes = {"name_or_path": model.tokenizer_name_or_path, "revision": None}
    return model.model_copy(update=changes)


def model_fingerprint(model: ModelConfig) -> str:
    """What identifies weights and tokenizer: the hash of a folder's bytes, or a hub commit; both
    where the tokenizer is that of another model.

    Raises:
        ModelError: the model is nowhere.
    """
    return "+".join(_place_fingerprint(one) for one in (model, _of_tokenizer(model)) if one)


def _place_fingerprint(model: ModelConfig) -> str:
    folder = _without_network(model.name_or_path)
    if folder is None:
        return f"{model.name_or_path}@{_hub_commit(model)}"
    return _folder_fingerprint(folder)


def _without_network(name: str) -> Path | None:
    """The folder behind a name that needs no hub; None for a hub id.

    Raises:
        ConfigError: the operator's list of models does not have it.
        ModelError: it is nowhere.
    """
    if not name:
        raise ModelError(
            "no model is given",
            fix="set model.name_or_path to a hub id or a folder; a component also takes an input "
            "model",
        )
    if name.startswith(BUILTIN_PREFIX):
        place = builtin(name)
        if place is None or not place.is_dir():
            known = [item for item in builtins() if (builtin(item) or Path()).is_dir()]
            raise ModelError(f"there is no model {name}", fix=f"use one of {', '.join(known)}")
        return place
    if "://" in name:
        raise ModelError(
            "a base model is a folder or a hub id, not a URL",
            where=f"model.name_or_path={name}",
            fix="fetch a published model with `dpo pull URL output=FOLDER` and name the folder",
        )
    path, is_path = _expanded(name), is_written_as_path(name)
    asked = path if is_path or path.is_dir() else f"hf://{name}"
    check_allowed(asked, f"model.name_or_path={name}", MODELS)
    if path.is_dir():
        return path
    if is_path or name.count("/") > 1:
        raise ModelError(
            "there is no such model folder", where=name, fix="check model.name_or_path"
        )
    if name == PACKAGED_ID and (packaged_folder() / MANIFEST).is_file():
        read_manifest(packaged_folder(), stage="base model", verify=False)
        return packaged_folder()
    return None


def is_written_as_path(name: str) -> bool:
    """Whether a model's name can be no hub id: it is absolute, or begins with a dot or ``~``."""
    return name.startswith(("/", ".", "~"))


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        # ~ of nobody
        return Path(name)


def _folder_fingerprint(folder: Path) -> str:
    """Hash of its files, kept in the cache by path, sizes and times so that it is read once."""
    files = sorted(visible_files(folder))
    state = [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    memory = cache_dir() / "fingerprints.json"
    known = _read_memory(memory)
    key = str(folder.resolve())
    if key in known and known[key]["state"] == state:
        return str(known[key]["fingerprint"])
    fingerprint = path_fingerprint(folder)
    known[key] = {"state": state, "fingerprint": fingerprint}
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(known))
    except OSError:
        # a read-only home only costs the time to hash again
        pass
    return fingerprint


def _read_memory(path: Path) -> dict[str, dict[str, object]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _from_hub(model: ModelConfig, patterns: list[str] = _PATTERNS) -> Path:
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(_HUB_TIMEOUT_SECONDS)))
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model.name_or_path,
                revision=model.revision,
                allow_patterns=patterns,
                etag_timeout=_HUB_TIMEOUT_SECONDS,
            )
        )
    except Exception as error:
        raise _hub_error(model, error) from None


def _hub_commit(model: ModelConfig) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(
            model.name_or_path, revision=model.revision, timeout=_HUB_TIMEOUT_SECONDS
        )
        return str(info.sha)
    except Exception as error:
        # of a tokenizer alone there may be no config.json
        for name in ("config.json", "tokenizer_config.json"):
            cached = try_to_load_from_cache(
                model.name_or_path, name, revision=model.revision or "main"
            )
            if isinstance(cached, str):
                # snapshots/<commit>/config.json
                return Path(cached).parent.name
        raise _hub_error(model, error) from None


def _hub_error(model: ModelConfig, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    other = (
        "run `dpo fetch model=smollm2`, which takes it from a Python package"
        if model.name_or_path == PACKAGED_ID
        else "give model.name_or_path the folder of a model that you have"
    )
    return ModelError(
        f"the model {model.name_or_path} cannot be had from the hub: {reason}",
        where="model.name_or_path",
        fix=f"check the name, the network and HF_TOKEN; or {other}",
    )
