"""What every component does around its stage: read settings, check the code, report one message."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo.config.compose import compose
from dpo.config.overrides import override_value
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, load_stage, overridden
from dpo.errors import ConfigError, DpoError, OutputGone
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.manifest import Manifest
from dpo.storage.progress import reported
from dpo.storage.provenance import note


@dataclass(frozen=True)
class Step:
    """A running step of the pipeline."""

    stage: Stage
    config: RunConfig
    """The settings that this step reads, and no others."""
    code: str
    """Fingerprint of the code that runs."""
    planned: dict[str, str]
    """What the run was planned with: fingerprints of ``code``, ``data``, ``model``."""

    @property
    def artifact(self) -> str:
        """Content hash of the earlier artifact that the run was planned to start from."""
        return self.planned.get("artifact", "")

    def expect(self, name: str, found: str) -> None:
        """Stop when ``name`` is no longer what the run was planned with.

        Raises:
            ConfigError: its fingerprint differs; a result would be cached under the wrong key.
        """
        _expect(self.stage, self.planned, name, found)


def _expect(stage: Stage, planned: Mapping[str, str], name: str, found: str) -> None:
    if (before := planned.get(name)) and before != found:
        raise ConfigError(
            f"the {name} of step {stage} changed after the run was planned: "
            f"fingerprint {found[:12]}, planned {before[:12]}",
            fix="start the run again; in containers, build images and pipeline from one commit",
        )


@contextmanager
def step(
    stage: Stage,
    settings: str,
    fingerprint: str = "",
    overrides: str = "",
    *,
    part: str = "",
    inputs: Mapping[str, InputArtifact | None] | None = None,
) -> Iterator[Step]:
    """Run a stage inside a component.

    Args:
        stage: Which one.
        settings: JSON of the settings that it reads; keys left out take their defaults.
        fingerprint: JSON of what the run was planned with; empty skips the comparison.
        overrides: JSON list of ``KEY=VALUE`` that a sweep puts over the settings; keys that the
            stage does not read are left out.
        part: Which held-out pairs an evaluation measures on; empty leaves it to the settings.
        inputs: The component's input artifacts, by their names there, for messages.
    """
    changes = json.loads(overrides) if overrides else []
    changes += [f"evaluation.part={part}"] if part else []
    planned = json.loads(fingerprint) if fingerprint else {}
    with reported(stage), _inputs_named(inputs or {}):
        # before the settings: other code may not know them, and nobody typed them
        _expect(stage, planned, "code", code := code_fingerprint(stage))
        config = load_stage(stage, text := overridden(stage, settings, changes))
        if "model" in (inputs or {}):
            config = _without_toy(config, text)
        running = Step(
            stage=stage,
            config=_with_sources(stage, config),
            code=code,
            planned=planned,
        )
        note(running.planned)
        try:
            yield running
        except OutputGone as error:
            # nobody typed its name: the backend gave it
            error.fix = (
                f"{error.fix}; the backend's cache may name what was removed from the "
                "store: run again with that step in --rerun"
            )
            raise


def _without_toy(config: RunConfig, text: str) -> RunConfig:
    """``config`` without the model that it has by default where the settings name none.

    In somebody's pipeline that would be trained, or recorded as the base, without a word.
    """
    if "name_or_path" in (json.loads(text or "{}").get("model") or {}):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": ""})})


@contextmanager
def _inputs_named(inputs: Mapping[str, InputArtifact | None]) -> Iterator[None]:
    """A message about a folder says which input of the component it is: nobody typed its path."""
    try:
        yield
    except DpoError as error:
        for name, item in inputs.items():
            if item and (error.where or "").startswith(item.path):
                error.where = f"input {name}: {error.where}"
        raise


def of_rows(config: RunConfig, settings: str, rows: Path) -> RunConfig:
    """The configuration of ingest with one file or folder for all sources.

    Args:
        config: What the settings say.
        settings: JSON that the component was given.
        rows: The file or folder.

    Raises:
        ConfigError: the settings name sources too.
    """
    if named := sorted({"datasets", "sources"} & set(json.loads(settings or "{}"))):
        raise ConfigError(
            f"both the input rows and {' and '.join(named)} in the settings say what to read",
            where="input rows",
            fix="leave one of them out",
        )
    composed = compose([f"datasets={override_value([str(rows)])}"]).config
    return config.model_copy(update={"datasets": composed.datasets, "sources": composed.sources})


def _with_sources(stage: Stage, config: RunConfig) -> RunConfig:
    """The sources behind ``datasets``, where a component is used alone and nobody composed them."""
    if stage != "ingest" or config.sources:
        return config
    composed = compose([f"datasets={override_value(config.datasets)}"]).config
    return config.model_copy(update={"datasets": composed.datasets, "sources": composed.sources})


class InputArtifact(Protocol):
    """What this module needs of an artifact that a component is given."""

    path: str


class DescribedArtifact(Protocol):
    """What this module needs of an artifact that a component makes."""

    metadata: dict[str, Any]


def describe(artifact: DescribedArtifact, manifest: Manifest) -> None:
    """Let the UI, and pipelines of others, see what the artifact is."""
    artifact.metadata |= {"step": manifest.stage, "content_hash": manifest.content_hash}


class MetricsArtifact(Protocol):
    """What this module needs of ``kfp.dsl.Metrics``."""

    path: str

    def log_metric(self, metric: str, value: float) -> None:
        """Show ``value`` in the UI."""


def log_metrics(artifact: MetricsArtifact, manifest: Manifest) -> None:
    """Show every number of the manifest's ``details`` in the UI; nested names joined by dots.

    They are written to the artifact's file as well: kfp.local takes a cached step for lost when one
    of its outputs has no file.
    """
    details = dict(manifest.details)
    # the training metrics keep the names of the reference code
    numbers = dict(_numbers("", {**details.pop("metrics", {}), **details}))
    for name, value in numbers.items():
        artifact.log_metric(name, value)
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers, indent=1, sort_keys=True), encoding="utf-8")


def _numbers(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _numbers(f"{name}.", value)
        elif _is_number(value):
            yield name, value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def copy_report(source: Path, target: Path) -> None:
    """Copy a report to where the UI looks for it; a step without one leaves a line saying so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target)
    else:
        target.write_text("This step wrote no report.\n", encoding="utf-8")


def write_text(target: Path, text: str) -> None:
    """Write a report that is a text to where the UI looks for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
