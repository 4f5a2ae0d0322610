"""``--from RUN_ID``: an earlier run's parameters and artifacts as the beginning of a new one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo.config.parameters import STARTS, stage_configs
from dpo.config.reuse import differing, shown
from dpo.config.stages import stage_settings
from dpo.errors import ConfigError, PipelineError, RequestError
from dpo.storage.runs import read_run_manifest
from pipelines import cluster
from pipelines.history import INPUTS, read_record
from pipelines.steps import PIPELINE


def beginning(
    defaults: Mapping[str, Any],
    runs: Path,
    *,
    run_id: str | None,
    rerun: Iterable[str],
    local: bool,
    store: str | None,
    endpoint: tuple[str | None, str | None],
    preset_name: str | None = None,
) -> dict[str, Any]:
    """Parameters to begin with: the package's, and over them those of an earlier run.

    Args:
        defaults: The parameters that this version of the pipeline has.
        runs: Folder of local runs.
        run_id: The earlier run; None for none.
        rerun: Steps to run again; what follows them runs as well.
        local: The new run is to be on this machine.
        store: Where to publish, and where the earlier run did if it was no local run.
        endpoint: Kubeflow's URL and namespace, to ask for the earlier run's store.
        preset_name: A preset that was asked for as well.

    Raises:
        ConfigError: a preset besides the earlier run.
        RequestError: the earlier run is not known, or left no artifacts.
    """
    begin = dict(defaults)
    if run_id:
        if preset_name:
            raise ConfigError(
                f"the preset {preset_name} and the run {run_id} to start from both say what all "
                "parameters are",
                fix="leave out one of the two; --set changes single parameters of the earlier run",
            )
        earlier = earlier_run(run_id, runs, local=local, store=store, endpoint=endpoint)
        begin |= base(earlier, defaults, rerun)
    if store:
        begin["publish_store"] = ""
    return begin


def earlier_run(
    run_id: str,
    runs: Path,
    *,
    local: bool,
    store: str | None = None,
    endpoint: tuple[str | None, str | None] = (None, None),
) -> dict[str, Any]:
    """``parameters`` and ``sources`` (URI of each step's output) of the run to start from.

    Args:
        run_id: The run.
        runs: Folder of local runs.
        local: The new run is to be on this machine.
        store: Where the earlier run published to, if it was no local run.
        endpoint: Kubeflow's URL and namespace, to ask for the store.

    Raises:
        RequestError: neither this machine nor the store knows the run, or it left no artifacts.
    """
    record = runs / "history" / run_id / "run.json"
    found: dict[str, Any] = {}
    if record.is_file():
        known = read_record(record)
        found = {"parameters": known["parameters"], "sources": known["artifacts"]}
    elif record.with_name("plan.json").is_file():
        # it was stopped: what it finished is in the cache, and nowhere else
        pass
    elif local and not store:
        raise RequestError(
            f"there is no local run {run_id}",
            where=str(record.parent.parent),
            fix="name a folder of it, or pass the --store of a run on Kubeflow",
        )
    else:
        found = known_run(store or _store_of(run_id, *endpoint), run_id)
    if not found.get("sources"):
        raise RequestError(
            f"run {run_id} left no artifacts to start from: it did not come to its gate",
            fix="run it again as it was: finished steps come from the cache",
        )
    return found


def known_run(store: str, run_id: str) -> dict[str, Any]:
    """The manifest of a run that somebody asked for.

    Raises:
        RequestError: the store has none of that run.
        StoreError: the store does not answer.
    """
    try:
        return read_run_manifest(store, run_id)
    except PipelineError as missing:
        raise RequestError(missing.found, where=missing.where, fix=missing.fix) from None


def _store_of(run_id: str, host: str | None, namespace: str | None) -> str:
    target = cluster.endpoint(host, namespace)
    client = cluster.connect(target)
    run = cluster.get_run(client, target, run_id)
    return store_of(client, target, run)


def store_of(client: Any, target: cluster.Endpoint, run: Any) -> str:
    """Where a run publishes, by its parameters.

    Raises:
        RequestError: it is a run of another pipeline, or names no store.
    """
    if url := str(cluster.parameters_of(run).get("publish_store") or ""):
        return url
    check_ours(client, target, run)
    raise RequestError(f"run {run.run_id} names no store", fix="pass the store's URL with --store")


def check_ours(client: Any, target: cluster.Endpoint, run: Any) -> None:
    """Refuse a run that the endpoint says is one of another pipeline.

    Raises:
        RequestError: it is.
    """
    name = cluster.pipeline_of(client, run)
    if name not in ("", PIPELINE):
        raise RequestError(
            f"run {run.run_id} is one of another pipeline, {name}: this is {PIPELINE}",
            where=cluster.link(target, run.run_id),
            fix="name a run of this pipeline (Runs in the UI lists each with its pipeline)",
        )


def base(
    earlier: Mapping[str, Any], defaults: Mapping[str, Any], rerun: Iterable[str]
) -> dict[str, Any]:
    """Parameters to begin with: the earlier run's, and its artifacts where they still hold.

    Args:
        earlier: From ``earlier_run``; empty changes nothing.
        defaults: The parameters that this version of the pipeline has.
        rerun: Steps to run again; what follows them runs as well.
    """
    if not earlier:
        return {}
    values = {n: v for n, v in (earlier.get("parameters") or {}).items() if n in defaults}
    again = set(rerun)
    for step, inputs in INPUTS.items():
        if again & set(inputs):
            again.add(step)
    sources = earlier["sources"]
    for name, step in STARTS.items():
        values[name] = "" if step in again else str(sources.get(step, ""))
    return values


def renewed(
    begin: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """``values`` without the earlier run's artifacts that do not hold for them.

    An artifact was made with the earlier run's settings. Where this run asks for others, its step
    runs, and so do those that follow it.

    Args:
        begin: From ``beginning``.
        values: Parameters of the new run, made of ``begin``.

    Returns:
        The parameters, and why each step that the earlier run's artifact would spare runs all the
        same.
    """
    taken = {step: name for name, step in STARTS.items() if begin.get(name)}
    if not taken:
        return dict(values), {}
    made, asked = stage_configs(begin), stage_configs(values)
    kept, new = dict(values), []
    reasons: dict[str, str] = {}
    for name, step in STARTS.items():
        if values[name] != begin[name]:
            # one that was given for this run; what the earlier run made of another does not follow
            new.append(step)
            continue
        upstream = [other for other in INPUTS[step] if other in new]
        changes = differing(
            step, stage_settings(made[step], step), stage_settings(asked[step], step)
        )
        if step in taken and (changes or upstream):
            kept[name] = ""
            new.append(step)
            reasons[step] = shown(changes) or f"reads the new output of {upstream[0]}"
    return kept, reasons


def told(run_id: str | None, reasons: Mapping[str, str]) -> list[str]:
    """What ``renewed`` found, one line a step."""
    return [f"{step} runs although it starts from {run_id}: {why}" for step, why in reasons.items()]
