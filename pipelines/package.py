"""The compiled pipeline: made, compared with the copy in the repository, adapted to a run."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo.config.places import config_dir
from dpo.errors import ConfigError, DpoError, PipelineError
from pipelines.deployment import (
    CHECKPOINTED_STEPS,
    CHECKPOINTS_VARIABLE,
    Deployment,
    Images,
    deploy,
    load_deployment,
    names,
)

PACKAGE = Path(__file__).resolve().parent / "preference_pipeline.yaml"
BUILT_IMAGES = Path(__file__).resolve().parent.parent / "build" / "images.json"
"""Names of the images that were built here last, as `make images` wrote them."""
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


_HEADER = """\
# Made by `make pipeline`; do not edit. The images are placeholders: no pod can start. A package for
# a cluster is made by `make pipeline DEPLOYMENT=...` or `submit.py --deployment ...`.
"""


def compile_pipeline(
    target: Path, deployment: Deployment | None = None, ingest_shards: int = 1
) -> None:
    """Write the compiled pipeline to ``target``, with a cluster's settings where some are given.

    Args:
        target: The file.
        deployment: The cluster's settings.
        ingest_shards: Tasks that share the reading of the data.
    """
    from kfp import compiler

    from pipelines import sharded
    from pipelines.preference import preference_pipeline

    if deployment is not None or ingest_shards > 1:
        with sharded.ingest_shards(ingest_shards):
            pipeline = _deployed(preference_pipeline, deployment or Deployment())
        compiler.Compiler().compile(pipeline, str(target))
        return
    compiler.Compiler().compile(preference_pipeline, str(target))
    target.write_text(_HEADER + target.read_text(encoding="utf-8"), encoding="utf-8")


def deployed_package(deployment: Deployment, ingest_shards: int = 1) -> list[dict[str, Any]]:
    """The documents of a package for a cluster: spec, then the Kubernetes part.

    Raises:
        ConfigError: an image is not named, so a pod could not start.
    """
    for kind in ("data", "train"):
        if not getattr(deployment.images, kind):
            raise ConfigError(
                f"the deployment names no {kind} image",
                where=f"images.{kind}",
                fix=f"build and push it with `make images-push`, then set images.{kind}",
            )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "package.yaml")
        compile_pipeline(target, deployment, ingest_shards)
        return load_package(target)


def _deployed(pipeline: Any, deployment: Deployment) -> Any:
    """The same pipeline, compiled again with settings on its tasks."""
    from kfp import dsl
    from kfp.dsl import pipeline_context

    @functools.wraps(pipeline.pipeline_func)
    def deployed(*channels: Any) -> None:
        pipeline.pipeline_func(*channels)
        deploy(pipeline_context.Pipeline.get_default_pipeline().tasks, deployment)

    spec = pipeline.pipeline_spec.pipeline_info
    return dsl.pipeline(
        name=spec.name, description=spec.description, display_name=spec.display_name
    )(deployed)


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines.package", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 on a difference")
    parser.add_argument("--output", type=Path, help="write a package for a cluster here")
    parser.add_argument("--deployment", default="", help=f"{', '.join(names())} or a YAML file")
    parser.add_argument(
        "--deploy", action="append", default=[], metavar="KEY=VALUE", help="train.gpus=0"
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
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Compile into the repository, compare with what is there, or write a package for a cluster."""
    options = _parser().parse_args(arguments)
    try:
        if options.output:
            return _write_for_cluster(options)
    except DpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.check:
        return _check()
    compile_pipeline(PACKAGE)
    print(f"wrote {PACKAGE.name}")
    _schema_file().write_text(deployment_schema(), encoding="utf-8")
    return 0


def _write_for_cluster(options: argparse.Namespace) -> int:
    deployment = load_deployment(options.deployment, options.deploy)
    if options.images:
        deployment = with_images(deployment, options.images)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_package(deployed_package(deployment, options.ingest_shards), options.output)
    print(f"wrote {options.output}: upload it in the Kubeflow UI under Pipelines")
    return 0


def with_images(deployment: Deployment, names_file: Path) -> Deployment:
    """The deployment with the images of a JSON file, where it names none itself.

    Raises:
        ConfigError: the file is not there or names no images.
    """
    try:
        found = json.loads(names_file.read_text(encoding="utf-8"))
        images = Images(data=found["data"], train=found["train"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "the names of the images cannot be read",
            where=str(names_file),
            fix="run `make images-push REGISTRY=...`, which writes them",
        ) from None
    chosen = {
        kind: getattr(deployment.images, kind) or getattr(images, kind)
        for kind in ("data", "train")
    }
    return deployment.model_copy(update={"images": Images(**chosen)})


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
