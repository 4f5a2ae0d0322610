"""The pipeline from Python: ``from pipelines import run_pipeline``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dpo.config.overrides import model_overrides
from dpo.config.parameters import STARTS
from dpo.errors import ConfigError, DpoError, PipelineError, RequestError, StoreError
from dpo.plan.booked import check_booked
from dpo.storage.runs import read_run_manifest
from pipelines import history, package, start
from pipelines.deployment import image_assignments, load_deployment, with_images, with_store
from pipelines.local import Job, locked, own_code, run_local
from pipelines.outcome import Outcome, nothing_started, read_outputs
from pipelines.pods import booked
from pipelines.request import check_candidates, local_store, parameters
from pipelines.sweep import Sweep, parse_sweep

Where = Literal["processes", "docker", "cluster"]
_KEPT = "Finished steps are kept: the same command goes on from there."


def run_pipeline(
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    where: Where = "processes",
    store: str | None = None,
    rerun: Sequence[str] = (),
    start_from: str | None = None,
    data_uri: str = "",
    sft_model_uri: str = "",
    reference_uri: str = "",
    sweep: Mapping[str, Sequence[Any]] | None = None,
    ingest_shards: int = 1,
    deployment: str = "",
    deploy: Mapping[str, Any] | None = None,
    images: Mapping[str, str] | None = None,
    nodes: int | None = None,
    runs_dir: str | PathLike[str] | None = None,
    endpoint: str | None = None,
    namespace: str | None = None,
    experiment: str | None = None,
    run_name: str | None = None,
    wait: bool = True,
    timeout_seconds: float | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run the whole pipeline on this machine, or submit it to Kubeflow Pipelines.

    Args:
        preset: A shipped set of parameters; None takes the pipeline's defaults, which are those
            of ``quick``, or those of ``start_from``, beside which a preset is refused.
        settings: Pipeline parameters (``preference_beta``) or configuration keys (``loss.beta``,
            ``sft.lr``) and their values.
        where: ``processes`` or ``docker`` on this machine, or ``cluster``.
        store: Where to publish; ``published`` in the runs folder for ``processes``.
        rerun: Steps to run although they are cached, and what follows.
        start_from: Id of an earlier run: its parameters, and its pairs, SFT model and
            log-probabilities, but for steps in ``rerun`` or whose settings change, and what
            follows them.
        data_uri: An earlier output of ingest to use instead of ``datasets``, verified.
        sft_model_uri: A model to use instead of SFT, verified.
        reference_uri: Log-probabilities to use instead of scoring, verified.
        sweep: Settings of preference training and the values to try of each, such as
            ``{"loss.beta": [0.1, 0.5]}``; the best goes through the gate.
        ingest_shards: Tasks that share the reading of the data; the result is that of one.
        deployment: On a cluster or in containers: name or file of the deployment.
        deploy: Settings of the deployment and their values, such as ``{"train.gpus": 2}``.
        images: Names by fixed tag or digest, by kind (``data``, ``train``); in containers those
            that were built here last when left out.
        nodes: On a cluster: nodes that train together.
        runs_dir: Folder of local runs; ``DPO_RUNS_DIR`` or ``runs`` when left out.
        endpoint: Kubeflow Pipelines; ``KF_PIPELINES_ENDPOINT`` when left out.
        namespace: Profile namespace, where the backend has several users.
        experiment: ``KF_PIPELINES_DEFAULT_EXPERIMENT_NAME`` when left out.
        run_name: Name in the UI.
        wait: Wait for the end of a run on a cluster; local runs are always waited for.
        timeout_seconds: Stop waiting after so long; a local run is then stopped too.
        console: Where progress is drawn; standard error when left out.

    Returns:
        How the run ended: ``state``, and verdict, figures and places as far as it came. A run that
        failed or that the gate refused is an outcome too and raises nothing.

    Raises:
        ConfigError: a setting that cannot work; found before anything runs.
        DpoError: data, base model, store or endpoint that are not to be had.
    """
    if timeout_seconds is not None and not 0 < timeout_seconds < math.inf:
        raise ConfigError(f"timeout_seconds={timeout_seconds} is not a positive number of seconds")
    if start_from is not None and not start_from.strip():
        # or an empty variable would run everything
        raise ConfigError("start_from is empty", fix="pass a run's id, or None for none")
    on_cluster = where == "cluster"
    if on_cluster:
        require_endpoint(endpoint)
    varied = [f"{key}={','.join(map(str, found))}" for key, found in (sweep or {}).items()]
    documents = package_for(
        where,
        deployment=deployment,
        assignments=_assignments(deploy, images, nodes, where),
        store=store,
        sweep=varied,
        n_shards=ingest_shards,
    )
    runs = runs_folder(runs_dir)
    begin = start.beginning(
        package.defaults(documents),
        runs,
        run_id=start_from,
        rerun=rerun,
        local=not on_cluster,
        store=store,
        endpoint=(endpoint, namespace),
        preset_name=preset,
    )
    uris = zip(STARTS, (data_uri, sft_model_uri, reference_uri), strict=True)
    values = parameters(
        begin,
        preset_name=preset,
        assignments=[
            *(f"{name}={uri}" for name, uri in uris if uri),
            *(f"{key}={_assigned(value)}" for key, value in (settings or {}).items()),
        ],
        store=store or (local_store(runs) if where == "processes" else None),
    )
    values, reasons = start.renewed(begin, values)
    console = console or Console(stderr=True)
    for line in start.told(start_from, reasons):
        console.print(line, markup=False, highlight=False)
    check_candidates(values, parse_sweep(varied))
    require_store(values)
    check_booked(values, booked(documents))
    package.set_uncached(documents, list(rerun))
    if on_cluster:
        package.keep_checkpoints(documents, str(values["publish_store"]))
    if not on_cluster:
        job = Job(documents, values, runs, runner=where)
        return run_here(job, console, timeout_seconds=timeout_seconds)
    return _run_on_cluster(
        documents,
        values,
        console,
        target=(endpoint, namespace, experiment),
        run_name=run_name,
        wait=wait,
        timeout_seconds=timeout_seconds,
    )


def package_for(
    where: Where,
    *,
    deployment: str = "",
    assignments: Sequence[str] = (),
    images: Path | None = None,
    store: str | None = None,
    sweep: Sequence[str] = (),
    n_shards: int = 1,
) -> list[dict[str, Any]]:
    """The documents of a package for a place: with images and settings where those matter.

    Args:
        where: Where it will run.
        deployment: Name or file of the cluster's settings.
        assignments: ``KEY=VALUE`` over the deployment.
        images: JSON with names of images; in containers those built here last when left out.
        store: Default of the form's field, on a cluster.
        sweep: ``KEY=VALUE,VALUE`` to vary.
        n_shards: Tasks that share the reading of the data.

    Raises:
        ConfigError: a setting that cannot work, or an image is not named.
    """
    candidates = parse_sweep(sweep)
    if where == "processes":
        # one after the other: two trainings at once would share this machine's processors
        sweep_here = Sweep(candidates, parallelism=1)
        if candidates or n_shards != 1:
            return package.local_package(sweep_here, n_shards)
        return package.load_package()
    settings = load_deployment(deployment, assignments)
    built, local = package.BUILT_IMAGES, where == "docker"
    if names_file := images or (built if local and built.is_file() else None):
        settings = with_images(settings, names_file)
    if store and not local:
        settings = with_store(settings, store)
    return package.deployed_package(settings, Sweep(candidates, 1 if local else 0), n_shards)


def _assignments(
    deploy: Mapping[str, Any] | None,
    images: Mapping[str, str] | None,
    nodes: int | None,
    where: Where,
) -> list[str]:
    """What the arguments change in the deployment.

    Raises:
        ConfigError: several nodes on this machine, or no kind of image.
    """
    if nodes is not None and where != "cluster":
        raise ConfigError(
            f"nodes={nodes} is for Kubeflow, and where={where!r} runs on this machine",
            fix='leave out one of the two, or pass where="cluster"',
        )
    return [
        *(f"{key}={_assigned(value)}" for key, value in (deploy or {}).items()),
        *image_assignments(f"{kind}={name}" for kind, name in (images or {}).items()),
        *([] if nodes is None else [f"nodes.count={nodes}"]),
    ]


def runs_folder(chosen: str | PathLike[str] | None = None) -> Path:
    """The folder of local runs: ``chosen``, else ``DPO_RUNS_DIR``, else ``runs``."""
    return Path(chosen or os.environ.get("DPO_RUNS_DIR") or "runs").absolute()


def require_endpoint(host: str | None) -> None:
    """Refuse a run on a cluster that nobody named, before anything is compiled for it.

    Raises:
        RequestError: neither ``host`` nor the environment names an endpoint.
    """
    from pipelines import cluster

    cluster.endpoint(host)


def require_store(values: Mapping[str, Any]) -> None:
    """Refuse a run that has nowhere to publish to.

    Raises:
        RequestError: no store is set.
    """
    if not values["publish_store"]:
        raise RequestError(
            "no store to publish to is given",
            fix="pass --store s3://bucket/prefix; credentials come from the environment",
        )


def _assigned(value: Any) -> str:
    """A value as an assignment's right-hand side; paths are texts."""
    return json.dumps(value, default=str)


def run_here(job: Job, console: Console, *, timeout_seconds: float | None = None) -> Outcome:
    """Obtain the base model, plan, run on this machine and read what the steps left.

    Raises:
        DpoError: what is wrong before the first step runs.
    """
    with nothing_started():
        with locked(job.runs):
            # found before the store in it is asked and a model is fetched
            pass
        obtain_model(job.parameters)
        plan = history.with_candidates(
            planned(job.parameters, key_only=job.runner == "processes"),
            package.candidates_of(job.documents),
        )

    stopped = Outcome("timed out", "")

    def remember(folder: Path, states: Mapping[str, str]) -> None:
        stopped.run_id, stopped.where, stopped.steps = folder.name, str(folder), dict(states)
        history.remember(folder, plan, states)

    try:
        run = run_local(job, console, timeout_seconds=timeout_seconds, at_end=remember)
    except TimeoutError:
        stopped.message = f"run {stopped.run_id} was stopped after {timeout_seconds:g} s\n{_KEPT}"
        return stopped
    except KeyboardInterrupt:
        if not stopped.run_id:
            raise
        text = f"Run {stopped.run_id} was stopped. {_KEPT}"
        raise KeyboardInterrupt(text, stopped.run_id) from None
    outcome = Outcome(
        "failed",
        run.run_id,
        where=str(run.folder),
        message=run.message,
        steps=run.states,
        seconds=run.seconds,
    )
    if run.succeeded:
        read_outputs(outcome, run.artifacts)
        _look_into_store(outcome, str(job.parameters["publish_store"]))
    return outcome


def _look_into_store(outcome: Outcome, store: str) -> None:
    """What the steps say they wrote must be found from here as well: a folder that a container did
    not see, or that was removed meanwhile, has none of it."""
    if outcome.state != "succeeded":
        return
    try:
        if read_run_manifest(store, outcome.run_id).get("published"):
            return
        what = f"the manifest of run {outcome.run_id} in the store names no published model"
        lost: DpoError = PipelineError(what, where=store)
    except StoreError as error:
        outcome.message = f"the store could not be looked into at the end:\n{error}"
        return
    except DpoError as error:
        lost = error
    outcome.state = "failed"
    outcome.message = str(
        PipelineError(
            f"the steps ended well, but what they published is not there: {lost.found}",
            where=lost.where,
            fix="see that this folder or bucket is the one that the steps write to, and that "
            "nothing empties it; run again",
        )
    )


def planned(values: Mapping[str, Any], *, key_only: bool) -> dict[str, str]:
    """What ``plan_run`` says before a run.

    Raises:
        DpoError: data, base model, artifact or store that is not there, or a setting that is wrong.
    """
    from dpo.data.plan import plan_run

    return plan_run(values, key_only=key_only)


def obtain_model(values: Mapping[str, Any]) -> None:
    """Have the base model here before the run, where its absence would end it.

    Raises:
        RequestError: it is not to be had.
    """
    command = [sys.executable, "-m", "dpo", "fetch", *model_overrides(values["model"])]
    environment = {**os.environ, **own_code()}
    if subprocess.run(command, check=False, stdout=2, env=environment).returncode:
        raise RequestError(
            f"the base model {values['model']} could not be obtained",
            fix="see the message above",
        )


def _run_on_cluster(
    documents: list[dict[str, Any]],
    values: dict[str, Any],
    console: Console,
    *,
    target: tuple[str | None, str | None, str | None],
    run_name: str | None,
    wait: bool,
    timeout_seconds: float | None,
) -> Outcome:
    from pipelines import cluster, sending
    from pipelines.on_cluster import name_of
    from pipelines.request import check_texts
    from pipelines.shared_places import check_inputs, check_places
    from pipelines.watch import wait as wait_for

    check_texts(values)
    check_places(documents, values)
    check_inputs(documents, values)
    place = cluster.endpoint(*target)
    client = cluster.connect(place)
    name = name_of(run_name, values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "package.yaml")
        package.save_package(documents, path)
        run_id = sending.submit_once(client, place, path, values, name, again=True)
    link = cluster.link(place, run_id)
    if not wait:
        return Outcome("submitted", run_id, where=link)
    console.print(link, highlight=False, soft_wrap=True)
    return wait_for(
        client,
        place,
        run_id,
        store=values["publish_store"],
        timeout_seconds=timeout_seconds,
        say=lambda text: console.print(text, markup=False, highlight=False),
    )
