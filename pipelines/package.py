"""The compiled pipeline: made, compared with the copy in the repository, adapted to a run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import ConfigError, PipelineError

PACKAGE = Path(__file__).resolve().parent / "preference_pipeline.yaml"
STEPS = (
    "fingerprint",
    "ingest",
    "sft",
    "reference",
    "preference",
    "evaluate",
    "gate",
    "publish",
)
"""Task names, in the order in which they run."""


def compile_pipeline(target: Path) -> None:
    """Write the compiled pipeline to ``target``."""
    from kfp import compiler

    from pipelines.preference import preference_pipeline

    compiler.Compiler().compile(preference_pipeline, str(target))


def load_package(path: Path = PACKAGE) -> list[dict[str, Any]]:
    """The documents of a compiled pipeline: its spec, then the Kubernetes part if it has one.

    Raises:
        PipelineError: the file is missing or not a compiled pipeline.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise PipelineError(
            f"the compiled pipeline cannot be read: {error}",
            where=str(path),
            fix="run `make pipeline`",
        ) from None
    if not documents or "pipelineInfo" not in documents[0]:
        raise PipelineError("not a compiled pipeline", where=str(path), fix="run `make pipeline`")
    return documents


def save_package(documents: list[dict[str, Any]], target: Path) -> None:
    """Write a package that Kubeflow and kfp.local accept."""
    with target.open("w", encoding="utf-8") as file:
        yaml.safe_dump_all(documents, file, sort_keys=True)


def defaults(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Name and default of every pipeline parameter, integers as ``int``."""
    definitions = documents[0]["root"]["inputDefinitions"]["parameters"]
    return {
        name: int(item["defaultValue"])
        if item["parameterType"] == "NUMBER_INTEGER"
        else item["defaultValue"]
        for name, item in definitions.items()
    }


def help_texts(documents: list[dict[str, Any]]) -> dict[str, str]:
    """Name and description of every pipeline parameter."""
    definitions = documents[0]["root"]["inputDefinitions"]["parameters"]
    return {name: item.get("description", "") for name, item in definitions.items()}


def set_images(documents: list[dict[str, Any]], images: Mapping[str, str]) -> None:
    """Replace the placeholder images by those of a registry."""
    executors = documents[0]["deploymentSpec"]["executors"]
    for executor in executors.values():
        container = executor["container"]
        container["image"] = images.get(container["image"], container["image"])


def set_uncached(documents: list[dict[str, Any]], steps: Iterable[str]) -> None:
    """Run these steps although the cache has a result, wherever in the spec they are.

    Raises:
        ConfigError: no step has that name.
    """
    wanted = set(steps)
    if unknown := sorted(wanted - set(STEPS)):
        raise ConfigError(
            f"no step is called {', '.join(unknown)}", fix=f"the steps are {', '.join(STEPS)}"
        )
    spec = documents[0]
    components = [spec["root"], *spec["components"].values()]
    for component in components:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if name in wanted:
                task.pop("cachingOptions", None)


def main(arguments: list[str] | None = None) -> int:
    """Compile into the repository, or with ``--check`` compare with what is there."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.package", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    options = parser.parse_args(arguments)
    if not options.check:
        compile_pipeline(PACKAGE)
        print(f"wrote {PACKAGE.name}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, PACKAGE.name)
        compile_pipeline(fresh)
        if PACKAGE.is_file() and fresh.read_bytes() == PACKAGE.read_bytes():
            print(f"{PACKAGE.name} is up to date")
            return 0
    print(f"{PACKAGE.name} differs from its source: run `make pipeline`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
