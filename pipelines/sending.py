"""What is sent to an endpoint: packages to register, runs and schedules to start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dpo.errors import PipelineError, RequestError
from pipelines.cluster import (
    ENDED,
    Endpoint,
    experiment_id,
    get_run,
    is_refusal,
    link,
    not_retried,
    problem,
)
from pipelines.cron import check_cron

_LOOKS_SECONDS = (0.0, 1.0, 3.0)
"""Pauses before each look whether something was started: the endpoint may be busy starting it."""
_PAGE = 100
_CONFLICT = 409
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Registered:
    """A pipeline version on the endpoint."""

    pipeline_id: str
    version_id: str
    new: bool
    """Whether this call made it."""


def upload(client: Any, target: Endpoint, package: Path, name: str, version: str) -> Registered:
    """Register a package, once: what is there under this name and version is used again.

    Args:
        client: From ``connect``.
        target: Where it is connected to.
        package: The compiled pipeline.
        name: Pipeline that it becomes, or becomes a version of.
        version: Name of the version; the same for the same content.

    Raises:
        RequestError: the endpoint refused it, or did not answer; nothing was started.
    """
    try:
        try:
            return _registered(client, target, package, name, version)
        except Exception as error:
            if getattr(error, "status", None) != _CONFLICT:
                raise
            # somebody registered it since it was looked for: it is found now
            return _registered(client, target, package, name, version)
    except Exception as error:
        if is_refusal(error):
            raise problem(
                "the endpoint refused the pipeline", target, error, RequestError
            ) from None
        lost = problem("the endpoint did not say that it has the pipeline", target, error)
        raise RequestError(
            lost.found,
            where=lost.where,
            fix="send it again: what it has of it already is not registered twice",
        ) from None


def _registered(
    client: Any, target: Endpoint, package: Path, name: str, version: str
) -> Registered:
    pipeline_id = _pipeline_id(client, target, name)
    if pipeline_id is None:
        uploaded = client.upload_pipeline(
            str(package), pipeline_name=name, namespace=target.namespace
        )
        pipeline_id = _id(uploaded, "pipeline_id")
    for known in _versions(client, pipeline_id):
        if known.display_name == version:
            return Registered(pipeline_id, known.pipeline_version_id, new=False)
    made = client.upload_pipeline_version(
        str(package), pipeline_version_name=version, pipeline_id=pipeline_id
    )
    return Registered(pipeline_id, _id(made, "pipeline_version_id"), new=True)


def _id(answer: Any, name: str) -> str:
    """The id of what was made.

    Raises:
        ValueError: the answer has none: something on the way ended it, and not what was asked.
    """
    if found := getattr(answer, name, None):
        return str(found)
    raise ValueError("its answer holds no id")


def _pipeline_id(client: Any, target: Endpoint, name: str) -> str | None:
    """Of the pipeline with this name; kfp's own search knows no namespace."""
    found = client.list_pipelines(
        page_size=_PAGE, filter=_named(name), namespace=target.namespace
    ).pipelines
    named = [pipeline for pipeline in found or [] if pipeline.display_name == name]
    return str(named[0].pipeline_id) if named else None


def _versions(client: Any, pipeline_id: str) -> Iterator[Any]:
    token = ""
    while True:
        page = client.list_pipeline_versions(pipeline_id, page_size=_PAGE, page_token=token)
        yield from page.pipeline_versions or []
        if not (token := page.next_page_token or ""):
            return


def _named(name: str) -> str:
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def submit(
    client: Any,
    target: Endpoint,
    package: Path,
    parameters: Mapping[str, Any],
    run_name: str,
    registered: Registered | None = None,
) -> str:
    """Start a run; returns its id.

    Args:
        client: From ``connect``.
        target: Where it is connected to.
        package: The compiled pipeline.
        parameters: Values of its parameters.
        run_name: Name in the UI.
        registered: Version to run and be linked to, instead of the package itself.

    Raises:
        RequestError: the endpoint refused it; nothing was started.
        PipelineError: the endpoint gave no answer; the run may have started.
    """
    try:
        asked = _asked(client, target, package, parameters, run_name, registered)
        return _id(client.run_pipeline(**asked), "run_id")
    except Exception as error:
        if is_refusal(error):
            raise problem("the endpoint refused the run", target, error, RequestError) from None
        raise problem("the endpoint did not say that the run started", target, error) from None


def _asked(
    client: Any,
    target: Endpoint,
    package: Path,
    parameters: Mapping[str, Any],
    run_name: str,
    registered: Registered | None,
) -> dict[str, Any]:
    """What a run and a schedule have in common: what to run, under which name, with what."""
    what: dict[str, Any] = {"pipeline_package_path": str(package)}
    if registered:
        what = {"pipeline_id": registered.pipeline_id, "version_id": registered.version_id}
    return {
        "experiment_id": experiment_id(client, target),
        "job_name": run_name,
        "params": dict(parameters),
        **what,
    }


def submit_once(
    client: Any,
    target: Endpoint,
    package: Path,
    parameters: Mapping[str, Any],
    run_name: str,
    registered: Registered | None = None,
    *,
    again: bool = False,
) -> str:
    """Start one run, also where the answer is lost; its id.

    The backend takes no id and no key from its caller, so the name tells: whoever stopped between
    the start and noting the id, or had no answer, finds the run by it.

    Args:
        client: From ``connect``.
        target: Where it is connected to.
        package: The compiled pipeline.
        parameters: Values of its parameters.
        run_name: Name in the UI.
        registered: Version to run and be linked to, instead of the package itself.
        again: Start one although there are runs with this name, as a person's name may be used
            twice; else a run with this name is the one that was meant.

    Raises:
        RequestError: the endpoint refused it; nothing was started.
        PipelineError: the endpoint does not say whether it has it.
    """
    known = find_runs(client, target, run_name)
    if known and not again:
        return known[-1]
    try:
        return submit(client, target, package, parameters, run_name, registered)
    except RequestError:
        raise
    except PipelineError as lost:
        return _looked_for(
            lambda: _new(find_runs(client, target, run_name), known),
            lost,
            absent=f"it has no new one named {run_name!r}: send it again",
            unknown=f"look for {run_name!r} at {target.ui}/#/runs before you send it again",
        )


def _new(found: list[str], known: list[str]) -> str | None:
    """The id that was not known before."""
    return next((one for one in reversed(found) if one not in known), None)


def _looked_for(
    look: Callable[[], _Found | None], lost: PipelineError, *, absent: str, unknown: str
) -> _Found:
    """What a request made whose answer is lost: the answer may be what was lost, not the request.

    Args:
        look: Asks the endpoint for it; None or false where it has none.
        lost: What is known of the request.
        absent: What to do where the endpoint has none.
        unknown: What to do where it does not say.

    Raises:
        PipelineError: ``lost`` with what to do.
    """
    fix = absent
    for pause in _LOOKS_SECONDS:
        time.sleep(pause)
        try:
            found = look()
        except PipelineError:
            fix = unknown
            continue
        if found:
            return found
        fix = absent
    raise PipelineError(lost.found, where=lost.where, fix=fix)


def find_runs(client: Any, target: Endpoint, run_name: str) -> list[str]:
    """Ids of the experiment's runs with this name, the newest first.

    Raises:
        RequestError: the endpoint does not answer; nothing was started.
    """
    with _asked_for_list("runs", target):
        found = client.list_runs(**_newest_named(client, target, run_name)).runs
    return [str(run.run_id) for run in found or [] if run.display_name == run_name]


def _find_schedules(client: Any, target: Endpoint, name: str) -> list[str]:
    """The same of recurring runs."""
    with _asked_for_list("schedules", target):
        found = client.list_recurring_runs(**_newest_named(client, target, name)).recurring_runs
    return [str(one.recurring_run_id) for one in found or [] if one.display_name == name]


@contextmanager
def _asked_for_list(what: str, target: Endpoint) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found = f"the endpoint does not list its {what}"
        raise problem(found, target, error, RequestError) from None


def _newest_named(client: Any, target: Endpoint, name: str) -> dict[str, Any]:
    return {
        "experiment_id": experiment_id(client, target),
        "page_size": _PAGE,
        "sort_by": "created_at desc",
        "filter": _named(name),
    }


def retry(client: Any, target: Endpoint, run_id: str) -> None:
    """Let a failed run go on where it failed.

    Where the answer is lost, the run's own state tells whether it goes on.

    Raises:
        RequestError: there is no such run, or it did not fail; nothing was started.
        PipelineError: the endpoint does not say whether it goes on.
    """
    try:
        # the SDK has no public method for it (kubeflow/pipelines#9771)
        client._run_api.run_service_retry_run(run_id)
    except Exception as error:
        if is_refusal(error):
            raise not_retried(client, target, run_id, error) from None
        _looked_for(
            lambda: get_run(client, target, run_id).state not in ENDED,
            problem(f"the endpoint did not say that run {run_id} goes on", target, error),
            absent="it does not go on: send it again",
            unknown=f"look at {link(target, run_id)} before you send it again",
        )


def schedule(
    client: Any,
    target: Endpoint,
    package: Path,
    parameters: Mapping[str, Any],
    run_name: str,
    cron: str,
    registered: Registered | None = None,
) -> str:
    """Start runs at set times; returns the id of the recurring run.

    Args:
        client: From ``connect``.
        target: Where it is connected to.
        package: The compiled pipeline.
        parameters: Values of its parameters.
        run_name: Name in the UI.
        cron: Six fields, seconds first, as Kubeflow wants it.
        registered: Version to run and be linked to, instead of the package itself.

    Raises:
        ConfigError: no set times, or none that come.
        RequestError: the endpoint refused it; nothing was scheduled.
        PipelineError: the endpoint does not say whether it has it.
    """
    check_cron(cron)
    known = _find_schedules(client, target, run_name)
    try:
        asked = _asked(client, target, package, parameters, run_name, registered)
        # a run that outlasts the interval is not joined by a second one
        made = client.create_recurring_run(
            **asked, cron_expression=cron, max_concurrency=1, no_catchup=True
        )
        return _id(made, "recurring_run_id")
    except Exception as error:
        if is_refusal(error):
            raise problem(
                "the endpoint refused the schedule", target, error, RequestError
            ) from None
        return _looked_for(
            lambda: _new(_find_schedules(client, target, run_name), known),
            problem("the endpoint did not say that it has the schedule", target, error),
            absent=f"it has no new one named {run_name!r}: send it again",
            unknown=f"look for {run_name!r} at {target.ui}/#/recurringruns before sending it again",
        )
