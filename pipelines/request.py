"""What a person asks for: a preset, ``--set`` assignments and steps to run again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo.config.describe import suggestion
from dpo.config.parameters import OVERRIDES, check_names, route, stage_configs, typed
from dpo.config.places import config_dir
from dpo.config.reuse import differing, shown
from dpo.config.stages import stage_json, stage_settings
from dpo.errors import ConfigError, holds_password
from pipelines.sweep import assignments_of

_SETTINGS_BYTES = 100_000
"""Of the 128 KiB that an argument may have (MAX_ARG_STRLEN); the rest is for fingerprints."""
_VARIABLE = re.compile(
    r"\{\{(?:[=$]|\s*(?:item|steps|inputs|outputs|pod|workflow|tasks)\.|\s*(?:steps|tasks|inputs)\s*\})"
    r"[^}]*\}+|\$\$|\$\([A-Z_][A-Z0-9_]*\)"
)
"""What Argo 4.0.5, which runs Kubeflow's steps, was seen to put another text in the place of, or to
end or wait for ever at; Kubeflow's own (``{{$``); and what Kubernetes makes of an argument: ``$``
of ``$$``, and a variable's value of ``$(HOME)``."""


def presets() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in (config_dir() / "presets").glob("*.yaml"))


def preset(name: str) -> dict[str, Any]:
    """Parameters of a preset.

    Raises:
        ConfigError: no preset has that name.
    """
    path = config_dir() / "presets" / f"{name}.yaml"
    if name not in presets():
        raise ConfigError(f"no preset is called {name}{suggestion(name, presets())}")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return values


def parameters(
    defaults: Mapping[str, Any],
    *,
    preset_name: str | None = None,
    assignments: Iterable[str] = (),
    store: str | None = None,
) -> dict[str, Any]:
    """Values of all pipeline parameters for one run, checked.

    Args:
        defaults: Name and default of each parameter, from the package.
        preset_name: Preset to start from; None starts from ``defaults``.
        assignments: ``KEY=VALUE`` of the command line, later ones win.
        store: Where to publish, when no assignment says.

    Raises:
        ConfigError: an unknown key, a value of another type, settings that cannot work or that are
            too long for a step.
    """
    values = {**defaults, **(preset(preset_name) if preset_name else {})}
    check_names(values)
    written: dict[str, str] = {}
    for assignment in assignments:
        if holds_password(assignment):
            raise ConfigError(
                f"{assignment.partition('=')[0]}: the URL has credentials in it, and parameters "
                "are recorded in every run",
                fix="leave them out; they are read from their own variables",
            )
        name, value = route(assignment)
        if name == "both_overrides":
            for list_name in OVERRIDES:
                values[list_name] = [*values[list_name], value]
        elif name in OVERRIDES:
            more = value if isinstance(value, list) else [value]
            values[name] = [*values[name], *more]
        else:
            values[name] = value
            written[name] = assignment.partition("=")[0]
    if store and not values["publish_store"]:
        values["publish_store"] = store
    values = {
        name: typed(written.get(name, name), value, defaults[name])
        for name, value in values.items()
    }
    check_lengths(values)
    return values


def check_texts(values: Mapping[str, Any]) -> None:
    """Refuse what would reach the steps of a cluster as another text, or stop the run in Argo:
    variables of the cluster's own. Other braces stay, as chat templates have them.

    Raises:
        ConfigError: a text has one in it.
    """
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if found := _VARIABLE.search(str(text)):
                raise ConfigError(
                    f"{found[0]} means something to the cluster: the steps would not get it as it "
                    "is written",
                    where=name,
                    fix="write it otherwise (of a template's item, item['text'] and not "
                    "item.text), or name a file that the image has",
                )


def check_lengths(values: Mapping[str, Any]) -> None:
    """Refuse settings that no process could be given, here or on a cluster.

    Raises:
        ConfigError: a setting cannot work, or a step's are longer than Linux lets an argument be.
    """
    for stage, config in stage_configs(values).items():
        # they are a text in the JSON that is one argument of the step's process
        n_bytes = len(json.dumps(stage_json(config, stage, key_only=False)))
        if n_bytes > _SETTINGS_BYTES:
            raise ConfigError(
                f"the settings of step {stage} take {n_bytes:,} bytes, and a process is given at "
                f"most {_SETTINGS_BYTES:,} of them",
                where="datasets" if stage == "ingest" else f"settings of {stage}",
                fix="name folders or globs (s3://bucket/pairs/*.jsonl) in place of single files",
            )


def check_candidates(values: Mapping[str, Any], candidates: Iterable[str]) -> None:
    """Refuse a sweep of which a candidate could not be trained.

    Args:
        values: Parameters of the run, checked.
        candidates: From ``parse_sweep``.

    Raises:
        ConfigError: settings that cannot work, or that need other log-probabilities than the ones
            that all candidates share.
    """
    scored: dict[str, Any] = {}
    for candidate in candidates:
        varied = assignments_of(candidate)
        asked = stage_configs(parameters(values, assignments=varied))["reference"]
        scored = scored or stage_settings(stage_configs(values)["reference"], "reference")
        if changes := differing("reference", scored, stage_settings(asked, "reference")):
            raise ConfigError(
                "all candidates of a sweep share the reference step's log-probabilities, which do "
                f"not hold for {' '.join(varied)}: {shown(changes)}",
                where="--sweep",
                fix=f"leave out what changes {next(iter(changes))}, or start a run for each value",
            )


def local_store(runs: Path) -> str:
    """The folder that local runs publish to unless told otherwise."""
    return (runs / "published").resolve().as_uri()
