"""What is published of a checkpoint: a Hugging Face folder that transformers and vLLM load.

Files that go as they are become links, with the hashes of the checkpoint's manifest: a file is read
once, while it is sent. What depends on the machine is taken out of the configurations, weights are
divided into shards of bounded size, and what a checkpoint may lack is added: generation
configuration, chat template, model card.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo.config.places import BUILTIN_PREFIX
from dpo.config.schema import RunConfig
from dpo.errors import ArtifactError, ConfigError, ModelError, writing
from dpo.publish import adapter, card
from dpo.publish.template import DIALOGUE as DIALOGUE_TEMPLATE
from dpo.publish.template import FILE as CHAT_TEMPLATE
from dpo.publish.tensors import INDEX, SINGLE, model_tensors, read_tensors, write_model
from dpo.storage.base_model import is_here, local_model
from dpo.storage.given_model import FOREIGN, TRAINED, read_model
from dpo.storage.lineage import SFT_CHECKPOINT, base_model, check_base, hub_model
from dpo.storage.manifest import MANIFEST, FileEntry, Manifest, sha256_file
from dpo.storage.model_folder import is_adapter

_LEFT_OUT = {
    MANIFEST,
    "run.json",
    "metrics.jsonl",
    "samples.jsonl",
    "trainer_state.json",
    card.FILE,
}
_LEFT_OUT_FOLDERS = {"training_state", "data", "reference", "tensorboard", "wandb"}
_LEFT_OUT_SUFFIXES = {".pt", ".pth", ".bin", ".log"}
_OF_THE_MACHINE = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}
"""Keys that say where a model or tokenizer was loaded from."""
_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", adapter.CONFIG)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@contextmanager
def gathered(policy: Path, config: RunConfig) -> Iterator[tuple[Path, list[FileEntry]]]:
    """A folder with exactly what is published of a checkpoint, and its files.

    Raises:
        ArtifactError: the checkpoint is not a whole model.
        ConfigError: it cannot be published in the form that is asked for.
    """
    with tempfile.TemporaryDirectory(prefix="dpo-publish-") as temporary:
        folder = Path(temporary)
        with writing(folder):
            files = _fill(folder, policy, config)
        yield folder, files


def _fill(folder: Path, policy: Path, config: RunConfig) -> list[FileEntry]:
    manifest = read_model(policy, "policy", verify=False)
    known = _link(policy, folder, manifest)
    _choose_weights(policy, folder, config, manifest)
    _complete(folder, ours=manifest.stage in TRAINED)
    base = _began_with(manifest, config)
    name, license_ = config.publish.name, config.publish.license
    text = card.model_card(policy, manifest, name, base, license_, folder)
    card.check_card(text, str(policy))
    (folder / card.FILE).write_text(text, encoding="utf-8")
    check_folder(folder)
    return _entries(folder, known)


def _began_with(manifest: Manifest, config: RunConfig) -> str:
    """The base model's name, of the lineage where one was recorded; empty for a folder."""
    if manifest.stage not in TRAINED:
        # the settings' is that of another program's training by chance only
        return ""
    recorded = manifest.lineage or manifest.settings
    name = base_model(manifest) if recorded else config.model.name_or_path
    hub = hub_model(manifest)
    if hub is None:
        hub = not Path(name).is_dir()
    return name if hub or name.startswith(BUILTIN_PREFIX) else ""


def _link(policy: Path, folder: Path, manifest: Manifest) -> dict[str, FileEntry]:
    known = {}
    for entry in manifest.files:
        path = Path(entry.path)
        hidden = (
            path.parts[0] in _LEFT_OUT_FOLDERS
            or path.name in _LEFT_OUT
            or path.suffix in _LEFT_OUT_SUFFIXES
        )
        if hidden:
            continue
        source = policy / entry.path
        if not source.is_file() or source.stat().st_size != entry.size:
            raise ArtifactError(
                f"{entry.path} of step {manifest.stage} is missing or has another size",
                where=str(policy),
                fix="run that step again, or restore the file",
            )
        target = folder / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source.resolve())
        known[entry.path] = entry
    return known


def _choose_weights(policy: Path, folder: Path, config: RunConfig, manifest: Manifest) -> None:
    """Adapter alone, merged, or the weights as they are; in shards of bounded size."""
    has_adapter = (folder / adapter.CONFIG).is_file()
    has_model = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
    if config.publish.lora == "adapter":
        if not has_adapter:
            raise ConfigError(
                "publish.lora=adapter: the checkpoint holds no adapter",
                where=str(policy),
                fix="train with lora.enabled=true lora.save=adapter, or leave publish.lora out",
            )
        _adapter_alone(folder, config, manifest)
        return
    max_bytes = config.publish.max_shard_mib << 20
    if has_adapter and not has_model:
        _check_unchanged(policy, manifest)
        _merge(folder, folder, manifest, config)
    elif any(path.stat().st_size > max_bytes for path in folder.glob("*.safetensors")):
        # shards are made of the files' bytes
        _check_unchanged(policy, manifest)
        _divide(folder, max_bytes)
    for name in (adapter.CONFIG, adapter.WEIGHTS):
        (folder / name).unlink(missing_ok=True)


def _adapter_alone(folder: Path, config: RunConfig, manifest: Manifest) -> None:
    for path in [*folder.glob("model*.safetensors"), folder / INDEX, folder / "config.json"]:
        path.unlink(missing_ok=True)
    own = adapter.read_config(folder)
    named = card.named_base(own)
    base = card.shown_base(_began_with(manifest, config))
    if manifest.stage == FOREIGN and named and not Path(named).is_dir():
        # whoever follows the name gets what it was trained on
        base = named
    elif sft := manifest.inputs.get("base"):
        # it changes the SFT model, not the model of the hub: a name that loads would be a wrong one
        base = f"{SFT_CHECKPOINT}{sft}"
    _replace(folder / adapter.CONFIG, adapter.alone(own, base))


def _merge(source: Path, target: Path, manifest: Manifest, config: RunConfig) -> None:
    """Write the whole model of an adapter, whose base may be an adapter as well.

    Args:
        source: The adapter's folder.
        target: Where to.
        manifest: The adapter's.
        config: Settings.
    """
    base = _base_of(source, config)
    _check_base(base, manifest)
    with tempfile.TemporaryDirectory(prefix="dpo-publish-") as temporary:
        if is_adapter(base):
            _merge(base, Path(temporary), read_model(base, "its base"), config)
            base = Path(temporary)
        _add_from_base(target, base)
        adapter.merge(source, base, target, config.publish.max_shard_mib << 20)


def _check_base(base: Path, manifest: Manifest) -> None:
    """Refuse a base that changed since the adapter was trained on it.

    Raises:
        ArtifactError: it did.
    """
    if not (trained_on := manifest.inputs.get("base")):
        # a model of the hub or of a folder: its lineage has no content hash to compare with
        return
    found = read_model(base, "its base", needs_tokenizer=False).content_hash
    check_base(trained_on, base, found, ArtifactError)


def _base_of(folder: Path, config: RunConfig) -> Path:
    """The folder of the adapter's base: one that it names, or a base model that is known here."""
    name = adapter.read_config(folder).get("base_model_name_or_path") or ""
    if name and any((Path(name) / file).is_file() for file in ("config.json", adapter.CONFIG)):
        return Path(name)
    model = config.model.model_copy(update={"name_or_path": name})
    try:
        if is_here(model):
            return local_model(model)
    except ModelError:
        pass
    raise ConfigError(
        "the adapter cannot be merged: its base is not on this machine",
        where=f"{adapter.CONFIG}: base_model_name_or_path={name!r}",
        fix="publish where the base is a folder, or the adapter alone: publish.lora=adapter",
    )


def _add_from_base(folder: Path, base: Path) -> None:
    """Configuration and tokenizer of the base, where the adapter's folder has none of its own."""
    for path in sorted(base.iterdir()):
        kept = path.suffix in (".json", ".jinja", ".model", ".txt") and path.name not in _LEFT_OUT
        if path.is_file() and kept and path.name != INDEX and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())


def _check_unchanged(policy: Path, manifest: Manifest) -> None:
    """Compare the bytes that new files are made of with what was evaluated.

    Raises:
        ArtifactError: they are others.
    """
    if read_model(policy, "policy").content_hash != manifest.content_hash:
        raise ArtifactError(
            "the model changed while it was published",
            where=str(policy),
            fix="evaluate it again, and publish it when nobody writes to it",
        )


def _divide(folder: Path, max_bytes: int) -> None:
    tensors = model_tensors(folder)
    links = [path for path in folder.glob("*.safetensors") if path.name != adapter.WEIGHTS]
    # the links go; the files that they name stay
    resolved = [replace(tensor, path=tensor.path.resolve()) for tensor in tensors.values()]
    for path in [*links, folder / INDEX]:
        path.unlink(missing_ok=True)
    write_model(folder, resolved, max_bytes)


def _complete(folder: Path, *, ours: bool) -> None:
    """Take out what depends on the machine; add what is missing.

    A model without a record of its training gets no chat template: nobody knows which it saw.
    """
    for name in _CONFIGS:
        if (folder / name).is_file():
            values = _read(folder / name)
            kept = {key: value for key, value in values.items() if key not in _OF_THE_MACHINE}
            if kept != values:
                _replace(folder / name, kept)
    if (folder / "config.json").is_file() and not (folder / "generation_config.json").is_file():
        config = _read(folder / "config.json")
        ids = {key: config[key] for key in _TOKEN_IDS if config.get(key) is not None}
        _replace(folder / "generation_config.json", {"_from_model_config": True, **ids})
    tokenizer = folder / "tokenizer_config.json"
    if not ours or not tokenizer.is_file() or (folder / CHAT_TEMPLATE).is_file():
        return
    if not _read(tokenizer).get("chat_template"):
        (folder / CHAT_TEMPLATE).write_text(DIALOGUE_TEMPLATE, encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Check that transformers and vLLM find what they read: configurations, tokenizer, weights.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    alone = (folder / adapter.CONFIG).is_file()
    needed = [adapter.CONFIG] if alone else ["config.json", "generation_config.json"]
    for name in (*needed, "tokenizer_config.json", card.FILE):
        if not (folder / name).is_file():
            raise _missing(name, folder)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise _missing("tokenizer.json", folder)
    if alone:
        if not (folder / adapter.WEIGHTS).is_file():
            raise _missing(adapter.WEIGHTS, folder)
        read_tensors(folder / adapter.WEIGHTS)
        return
    if not _read(folder / "config.json").get("architectures"):
        raise ArtifactError(
            "config.json names no architecture", where=str(folder), fix="run the training again"
        )
    model_tensors(folder)


def _missing(name: str, folder: Path) -> ArtifactError:
    return ArtifactError(
        f"the model has no {name}", where=str(folder), fix="run the training step again"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(
            f"{path.name} is not JSON: {error}", where=str(path), fix="run the training again"
        ) from None
    if not isinstance(values, dict):
        raise ArtifactError(
            f"{path.name} is no JSON object", where=str(path), fix="run the training again"
        )
    return values


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Write a file in place of a link, not through it."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entries(folder: Path, known: dict[str, FileEntry]) -> list[FileEntry]:
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() and relative in known:
            found.append(known[relative])
        else:
            found.append(FileEntry(relative, path.stat().st_size, sha256_file(path)))
    return found
