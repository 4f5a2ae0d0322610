"""The compiled pipeline: made, compared with the copy in the repository, adapted to a run."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dpo.config.places import config_dir
from dpo.errors import ConfigError, DpoError, PipelineError, system_problem
from pipelines import sharded
from pipelines.deployment import (
    CHECKPOINTED_STEPS,
    CHECKPOINTS_VARIABLE,
    Deployment,
    Images,
    image_assignments,
    load_deployment,
    names,
    with_images,
    with_store,
)
from pipelines.pods import deploy
from pipelines.request import check_candidates, parameters, preset, presets
from pipelines.shared_places import check_places
from pipelines.steps import SELECT, STEPS, TASKS, step_of
from pipelines.sweep import NO_SWEEP, Sweep, compiled_with, parse_sweep

PACKAGE = Path(__file__).resolve().parent / "preference_pipeline.yaml"
# libyaml's, where this PyYAML has it, reads a package ten times as fast
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
BUILT_IMAGES = Path(__file__).resolve().parent.parent / "build" / "images.json"
"""Names of the images that were built here last, as `make images` wrote them."""


_HEADER = """\
# Made by `make pipeline`; do not edit. The images are placeholders: no pod can start. A package for
# a cluster is made by `make pipeline DEPLOYMENT=...` or `submit.py --deployment ...`.
"""


def steps_of(documents: list[dict[str, Any]]) -> tuple[str, ...]:
    """The steps of a package in the order in which they run."""
    return TASKS if f"comp-{SELECT}" in documents[0]["components"] else STEPS


def candidates_of(documents: list[dict[str, Any]]) -> tuple[str, ...]:
    """What the candidates of a package's sweep change, as ``parse_sweep`` returned it."""
    for component in documents[0]["components"].values():
        if task := component.get("dag", {}).get("tasks", {}).get(SELECT):
            return tuple(task["inputs"]["parameters"]["candidates"]["runtimeValue"]["constant"])
    return ()


def local_package(sweep: Sweep, n_shards: int = 1) -> list[dict[str, Any]]:
    """The documents of a package with a sweep or a shared ingest, to run on this machine."""
    with tempfile.TemporaryDirectory() as folder, _varied(sweep, n_shards):
        target = Path(folder, "package.yaml")
        _compile_again(target, None)
        return load_package(target)


@contextmanager
def _varied(sweep: Sweep, n_shards: int) -> Iterator[None]:
    # imported first, for kfp compiles what it decorates: without sweep and shards
    importlib.import_module("pipelines.preference")
    with compiled_with(sweep), sharded.ingest_shards(n_shards):
        yield


def compile_pipeline(target: Path, deployment: Deployment | None = None) -> None:
    """Write the compiled pipeline to ``target``, with a cluster's settings where some are given."""
    if deployment is not None:
        _compile_again(target, deployment)
        return
    from kfp import compiler

    from pipelines.preference import preference_pipeline

    compiler.Compiler().compile(preference_pipeline, str(target))
    target.write_text(_HEADER + target.read_text(encoding="utf-8"), encoding="utf-8")


def deployed_package(
    deployment: Deployment, sweep: Sweep = NO_SWEEP, n_shards: int = 1
) -> list[dict[str, Any]]:
    """The documents of a package for a cluster: spec, then the Kubernetes part.

    Raises:
        ConfigError: an image is not named, so a pod could not start.
    """
    for kind in ("data", "train"):
        if not getattr(deployment.images, kind):
            raise ConfigError(
                f"the deployment names no {kind} image",
                where=f"images.{kind}",
                fix="build and push it with `make images-push`, then pass --images "
                f"build/images.json; or name one that the cluster has: --image {kind}=NAME:TAG",
            )
    with tempfile.TemporaryDirectory() as folder, _varied(sweep, n_shards):
        target = Path(folder, "package.yaml")
        compile_pipeline(target, deployment)
        documents = load_package(target)
    if deployment.store:
        set_defaults(documents, {"publish_store": deployment.store})
    return documents


def set_defaults(documents: list[dict[str, Any]], values: Mapping[str, Any]) -> None:
    """Change what the form of a package shows in these fields."""
    definitions = documents[0]["root"]["inputDefinitions"]["parameters"]
    for name, value in values.items():
        definitions[name]["defaultValue"] = value


def _compile_again(target: Path, deployment: Deployment | None) -> None:
    """Compile the pipeline with the sweep of this moment, and with settings on its tasks."""
    from kfp import compiler, dsl
    from kfp.dsl import pipeline_context

    from pipelines.preference import preference_pipeline

    pipeline = preference_pipeline

    @functools.wraps(pipeline.pipeline_func)
    def again(*channels: Any) -> None:
        pipeline.pipeline_func(*channels)
        if deployment is not None:
            deploy(pipeline_context.Pipeline.get_default_pipeline().tasks, deployment)

    spec = pipeline.pipeline_spec.pipeline_info
    made = dsl.pipeline(
        name=spec.name, description=spec.description, display_name=spec.display_name
    )(again)
    compiler.Compiler().compile(made, str(target))


def load_package(path: Path = PACKAGE) -> list[dict[str, Any]]:
    """The documents of a compiled pipeline: its spec, then the Kubernetes part if it has one.

    Raises:
        PipelineError: the file is missing or not a compiled pipeline.
    """
    try:
        documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_LOADER))
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


def keep_checkpoints(documents: list[dict[str, Any]], store: str) -> None:
    """Let training keep its checkpoints in ``store``, where a new pod finds them.

    A deployment that says where (``checkpoint_uri``) is left as it is; so is everything where
    ``store`` is a folder, which another pod does not see. Not a part of Kubeflow's cache key.
    """
    if not store.startswith(("s3://", "minio://")):
        return
    executors = documents[0]["deploymentSpec"]["executors"]
    for step in CHECKPOINTED_STEPS:
        variables = executors[f"exec-{step}"]["container"].setdefault("env", [])
        if all(variable["name"] != CHECKPOINTS_VARIABLE for variable in variables):
            place = f"{store.rstrip('/')}/checkpoints"
            variables.append({"name": CHECKPOINTS_VARIABLE, "value": place})


def set_uncached(documents: list[dict[str, Any]], steps: Iterable[str]) -> None:
    """Run these steps although the cache has a result, wherever in the spec they are.

    Raises:
        ConfigError: no step has that name.
    """
    wanted = set(steps)
    if unknown := sorted(wanted - set(steps_of(documents))):
        raise ConfigError(
            f"no step is called {', '.join(unknown)}", fix=f"the steps are {', '.join(STEPS)}"
        )
    spec = documents[0]
    components = [spec["root"], *spec["components"].values()]
    for component in components:
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if step_of(name) in wanted:
                task.pop("cachingOptions", None)


def write_components(folder: Path, images: Mapping[str, str] | None = None) -> list[Path]:
    """Compile each component alone, for other people's pipelines; returns the files.

    Args:
        folder: Where to write NAME.yaml.
        images: Placeholder image to the one to put in its place.
    """
    from kfp import compiler

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for step in TASKS:
        component = getattr(importlib.import_module(f"components.{step}"), step)
        target = folder / f"{step}.yaml"
        compiler.Compiler().compile(component, str(target))
        if images:
            documents = load_package(target)
            set_images(documents, images)
            save_package(documents, target)
        written.append(target)
    return written


def placeholders(images: Images) -> dict[str, str]:
    """The placeholder image of each kind and what a deployment puts in its place."""
    from components.images import DATA_IMAGE, TRAIN_IMAGE

    named = {DATA_IMAGE: images.data, TRAIN_IMAGE: images.train}
    return {placeholder: name for placeholder, name in named.items() if name}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.package", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--output", type=Path, help="write a package for a cluster here")
    parser.add_argument("--deployment", default="", help=f"{', '.join(names())} or a YAML file")
    parser.add_argument(
        "--deploy", action="append", default=[], metavar="KEY=VALUE", help="train.gpus=0"
    )
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="train over N nodes; short for nodes.count=N"
    )
    parser.add_argument(
        "--images", type=Path, help="JSON with the names that `make images-push` wrote"
    )
    parser.add_argument(
        "--ingest-shards",
        type=int,
        default=1,
        metavar="N",
        help="tasks that share the reading of the data, for sets that outgrow one machine",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="one image by fixed tag or digest: data=registry/dpo-data:1.2",
    )
    parser.add_argument("--preset", choices=presets(), help="what the form's fields show")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V", help="loss.beta=0.05,0.1,0.5"
    )
    parser.add_argument("--store", default="", help="where runs publish to unless they say")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Compile into the repository, compare with what is there, or write a package for a cluster."""
    options = _parser().parse_args(arguments)
    try:
        _check_options(options)
        if options.output:
            return _write_for_cluster(options)
        if options.check:
            return _check()
        compile_pipeline(PACKAGE)
        print(f"wrote {PACKAGE.name}")
        _schema_file().write_text(deployment_schema(), encoding="utf-8")
    except (DpoError, OSError) as problem:
        error = system_problem(problem) if isinstance(problem, OSError) else problem
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what would be passed over in silence.

    Raises:
        ConfigError: a setting of a package for a cluster, and none is written.
    """
    usual = vars(_parser().parse_args([]))
    given = [name for name, value in vars(options).items() if value != usual[name]]
    if options.check and given != ["check"]:
        raise ConfigError("--check compares only", fix="leave out --check or all other options")
    if given and not options.check and not options.output:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is of a package for a cluster, and the copy in the "
            "repository has no such settings",
            fix="say with --output FILE where to write one, such as build/preference_pipeline.yaml",
        )


def _write_for_cluster(options: argparse.Namespace) -> int:
    nodes = [] if options.nodes is None else [f"nodes.count={options.nodes}"]
    deployment = load_deployment(
        options.deployment, [*options.deploy, *image_assignments(options.image), *nodes]
    )
    if options.images:
        deployment = with_images(deployment, options.images)
    if options.store:
        deployment = with_store(deployment, options.store)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(parse_sweep(options.sweep))
    documents = deployed_package(deployment, sweep, options.ingest_shards)
    if options.preset:
        set_defaults(documents, preset(options.preset))
    check_candidates(parameters(defaults(documents)), sweep.candidates)
    check_places(documents, defaults(documents))
    save_package(documents, options.output)
    print(f"wrote {options.output}: upload it in the Kubeflow UI under Pipelines")
    if not defaults(documents)["publish_store"]:
        kept = "" if deployment.checkpoint_root else ", and training keeps no checkpoints"
        print(
            "its form names no store: whoever starts a run fills in publish_store"
            f"{kept} (--store s3://bucket/prefix names one)"
        )
    folder = options.output.parent / "components"
    write_components(folder, placeholders(deployment.images))
    print(f"wrote {folder}/*.yaml: each step alone, for pipelines of your own")
    return 0


def _check() -> int:
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, PACKAGE.name)
        compile_pipeline(fresh)
        texts = {PACKAGE: fresh.read_text(encoding="utf-8"), _schema_file(): deployment_schema()}
        for path, text in texts.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{path.name} differs from its source: run `make pipeline`", file=sys.stderr)
                return 1
            print(f"{path.name} is up to date")
    return 0


def deployment_schema() -> str:
    """JSON Schema of deployment files, for editors."""
    return json.dumps(Deployment.model_json_schema(), indent=1, sort_keys=True) + "\n"


def _schema_file() -> Path:
    return config_dir() / "schemas" / "deployment.json"


if __name__ == "__main__":
    sys.exit(main())
