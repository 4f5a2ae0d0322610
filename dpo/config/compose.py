"""Composes the configuration: Hydra's groups and overrides, then our types.

Hydra finds the files and applies the overrides; ``RunConfig`` decides what is allowed. The shipped
configuration comes last in the search path, so a user's ``--config-dir`` adds choices
(``config/model/mine.yaml``) and may replace ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from dpo.config.describe import nearest, suggestion, validation_error
from dpo.config.overrides import model_overrides
from dpo.config.places import config_dir
from dpo.config.schema import RunConfig
from dpo.errors import ConfigError

GROUPS = ("model", "loss", "trainer")
_ALIASES = {"model.block": "model.block_name"}
_ENVIRONMENT = re.compile(r"\$\{\s*oc\.")
_LOCATION = re.compile(r"[/\\.:*]")


@dataclass(frozen=True)
class Composed:
    """A configuration and where each of its values came from."""

    config: RunConfig
    origins: Mapping[str, str]
    """By leaf key: ``default``, a file of the configuration, or ``command line``."""
    warnings: Sequence[str] = field(default_factory=tuple)


def compose(overrides: Sequence[str] = (), *, user_dir: Path | None = None) -> Composed:
    """Compose and validate a run's configuration.

    Args:
        overrides: ``key=value`` and ``group=choice`` in Hydra's grammar; later ones win.
        user_dir: Folder with further groups or choices, searched before the shipped one.

    Raises:
        ConfigError: an unknown key or choice, a value that cannot work, or a broken YAML file.
    """
    parsed, warnings = _parse(overrides)
    directories = [path for path in (user_dir, config_dir()) if path is not None]
    if user_dir is not None and not user_dir.is_dir():
        raise ConfigError("there is no such folder of configuration", where=str(user_dir))
    names, locations = _split_datasets(parsed, directories)
    lines = [_as_hydra(item) for item in parsed]
    lines += [f"+dataset@sources.{name}={name}" for name in names]
    # Hydra applies group choices before values, so sources.hh.path=... wins over the group's file
    values = _compose_values(lines, directories, parsed)
    values.setdefault("sources", {})
    for name, location in locations.items():
        values["sources"][name] = {"path": location, **values["sources"].get(name, {})}
    if unused := sorted(set(values["sources"]) - {*names, *locations}):
        raise ConfigError(
            f"sources.{unused[0]} is set, but datasets does not name {unused[0]}",
            fix=f"add {unused[0]} to datasets=[...]",
        )
    values["datasets"] = [*names, *locations]
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise validation_error(error, RunConfig) from None
    origins = _origins(config, values, parsed, names, directories)
    return Composed(config=config, origins=origins, warnings=tuple(warnings))


def choices(group: str, directories: Iterable[Path] | None = None) -> list[str]:
    """Names that a group offers."""
    folders = [config_dir()] if directories is None else list(directories)
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
    warnings = []
    renamed = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip("+~ "):
            raise ConfigError(
                f"{text!r} is not key=value", fix="write for example loss.beta=0.1 or model=tiny"
            )
        if _ENVIRONMENT.search(value):
            raise ConfigError(
                f"{key}: an override cannot read the environment; its value would be recorded in "
                "every artifact",
                fix="write the value itself; credentials are read from their own variables",
            )
        if new := _ALIASES.get(key.lstrip("+")):
            warnings.append(f"{key} is the old name of {new}: use {new}")
            key = new
        if key == "model" and not value.startswith(("'", '"')):
            # a hub id or a folder too, as in run_training() and the pipeline's form
            renamed += model_overrides(value)
        else:
            renamed.append(f"{key}={value}")
    try:
        return OverridesParser.create().parse_overrides(renamed), warnings
    except HydraException as error:
        text = str(error).splitlines()[0]
        raise ConfigError(
            f"an override cannot be read: {text}",
            fix="quote values that hold commas, brackets, spaces or letters beyond ASCII: "
            "key='a value', datasets=['données.jsonl']",
        ) from None


def _as_hydra(override: Override) -> str:
    """Every key of the schema may be set, in the YAML or not; the schema refuses the others."""
    text = str(override.input_line)
    if override.key_or_group in GROUPS or text.startswith(("+", "~")):
        return text
    return f"++{text}"


def _split_datasets(
    parsed: Sequence[Override], directories: Sequence[Path]
) -> tuple[list[str], dict[str, str]]:
    """The names among ``datasets``, and a source for each entry that is a file, folder or URL."""
    value: Any = None
    for override in parsed:
        if override.key_or_group == "datasets":
            value = override.value()
    if value is None:
        value = _default_datasets(directories)
    entries = value if isinstance(value, list) else [value]
    known = choices("dataset", directories)
    names: list[str] = []
    locations: dict[str, str] = {}
    # also those that come after a file of the same name: one of the two would be lost
    named = set(known) & set(map(str, entries))
    for entry in map(str, entries):
        if entry in known:
            names.append(entry)
        elif _LOCATION.search(entry):
            locations[_source_name(entry, {*named, *locations})] = entry
        else:
            raise ConfigError(
                f"datasets: there is no data set {entry}{suggestion(entry, known)}",
                fix=f"name one of {', '.join(known)}, or a file, folder or URL",
            )
    if not names and not locations:
        raise ConfigError("datasets is empty", fix=f"name one of {', '.join(known)}, or a file")
    if len(set(names)) != len(names):
        raise ConfigError(f"datasets names a data set twice: {', '.join(names)}")
    return names, locations


def _default_datasets(directories: Sequence[Path]) -> Any:
    for directory in directories:
        path = directory / "config.yaml"
        if path.is_file():
            loaded = _load_yaml(path)
            if "datasets" in loaded:
                return loaded["datasets"]
    return RunConfig.model_fields["datasets"].default


def _source_name(location: str, taken: set[str]) -> str:
    stem = re.split(r"[/\\]", location.rstrip("/\\"))[-1].split(".")[0].split("*")[0]
    base = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "data"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


_before_shipped: ContextVar[Sequence[Path]] = ContextVar("_before_shipped", default=())


class _UserFolders(SearchPathPlugin):
    """Puts the user's folders in front: ``hydra.searchpath`` can only add them at the end."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(_before_shipped.get()):
            search_path.prepend(provider="config-dir", path=f"file://{folder.absolute()}")


Plugins.instance().register(_UserFolders)


@contextmanager
def _hydra(directories: Sequence[Path]) -> Iterator[None]:
    """Hydra keeps its state in a global; leave it as it was found."""
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    token = _before_shipped.set(directories[:-1])
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(directories[-1].absolute())):
            yield
    finally:
        _before_shipped.reset(token)
        GlobalHydra.instance().hydra = state


def _compose_values(
    lines: Sequence[str], directories: Sequence[Path], parsed: Sequence[Override]
) -> dict[str, Any]:
    try:
        with _hydra(directories):
            config = hydra_compose("config", overrides=list(lines))
            values = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _hydra_error(error, parsed, directories) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _hydra_error(
    error: Exception, parsed: Sequence[Override], directories: Sequence[Path]
) -> ConfigError:
    for override in parsed:
        group = override.key_or_group
        if (section := group.partition(".")[0]) not in RunConfig.model_fields:
            return ConfigError(
                f"unknown key {group}{suggestion(section, RunConfig.model_fields)}",
                fix="`dpo config` prints every key with its value",
            )
        if group in GROUPS:
            choice, known = str(override.value()), choices(group, directories)
            if choice not in known:
                more = "; or write a hub's id as org/name, a folder as ./name"
                return ConfigError(
                    f"{group}={choice}: there is no such choice{nearest(choice, known)}",
                    fix=f"the choices are {', '.join(known)}{more if group == 'model' else ''}",
                )
    for directory in directories:
        for path in directory.rglob("*.yaml"):
            _load_yaml(path)
    text = " ".join(str(error).split())
    return ConfigError(f"the configuration cannot be composed: {text}")


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(
            f"a configuration file is not readable YAML: {problem}", where=f"{path}{line}"
        ) from None
    return loaded if isinstance(loaded, dict) else {}


def _origins(
    config: RunConfig,
    values: Mapping[str, Any],
    parsed: Sequence[Override],
    names: Sequence[str],
    directories: Sequence[Path],
) -> dict[str, str]:
    chosen = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in GROUPS}
    defaults = _group_defaults(directories)
    given = [o.key_or_group for o in parsed if o.key_or_group not in GROUPS]
    files = {group: f"{group}/{chosen.get(group) or defaults.get(group)}.yaml" for group in GROUPS}
    written = flatten(values)
    origins = {}
    for key in flatten(config.model_dump(mode="json")):
        section, _, rest = key.partition(".")
        if any(key == name or key.startswith(f"{name}.") for name in given):
            origins[key] = "command line"
        elif key not in written and not any(part.startswith(f"{key}.") for part in written):
            origins[key] = "default"
        elif section in GROUPS:
            origins[key] = files[section]
        elif section == "sources" and rest.partition(".")[0] in names:
            origins[key] = f"dataset/{rest.partition('.')[0]}.yaml"
        elif section in ("sources", "datasets") and "datasets" in given:
            origins[key] = "command line"
        else:
            origins[key] = "config.yaml"
    return origins


def _group_defaults(directories: Sequence[Path]) -> dict[str, str]:
    for directory in directories:
        path = directory / "config.yaml"
        if path.is_file():
            entries = _load_yaml(path).get("defaults", [])
            return {
                str(group): str(choice)
                for entry in entries
                if isinstance(entry, dict)
                for group, choice in entry.items()
            }
    return {}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
