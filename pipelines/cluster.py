"""Runs on a Kubeflow Pipelines endpoint: submit, watch, read the verdict from the store.

The client's own waiting is not used: it hangs on a cancelled run (kubeflow/pipelines#14473) and
does not tell a failed run from a good one.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.errors import ConfigError, PipelineError, RequestError, holds_password

_ANSWER_SECONDS = 20.0
_CRON_FIELDS = 6
_BAD_REQUEST = 400


@dataclass(frozen=True)
class Endpoint:
    """Where Kubeflow Pipelines answers."""

    host: str
    ui: str
    namespace: str | None
    experiment: str


def is_configured() -> bool:
    """Whether the environment names an endpoint."""
    return bool(os.environ.get("KF_PIPELINES_ENDPOINT"))


def endpoint(
    host: str | None = None, namespace: str | None = None, experiment: str | None = None
) -> Endpoint:
    """An endpoint from arguments or the conventional environment variables.

    Raises:
        RequestError: neither names one.
        ConfigError: it has credentials in it.
    """
    host = host or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host:
        raise RequestError(
            "no Kubeflow Pipelines endpoint is given",
            fix="set KF_PIPELINES_ENDPOINT or pass --endpoint URL; to run here, pass --local",
        )
    ui = os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host
    if holds_password(host) or holds_password(ui):
        raise ConfigError(
            "the URL of the endpoint has credentials in it, and links to it are shown and logged",
            fix="leave them out and set KF_PIPELINES_TOKEN or KF_PIPELINES_SA_TOKEN_PATH",
        )
    return Endpoint(
        host=host.rstrip("/"),
        ui=ui.rstrip("/"),
        namespace=namespace,
        experiment=experiment
        or os.environ.get("KF_PIPELINES_DEFAULT_EXPERIMENT_NAME")
        or "preference-fine-tuning",
    )


def connect(target: Endpoint) -> Any:
    """A KFP client; inside a cluster with the pod's own service account token.

    Raises:
        PipelineError: the endpoint does not answer.
    """
    import kfp

    class Client(kfp.Client):  # type: ignore[misc]
        """Without kfp's own five tries and five logged tracebacks when the endpoint refuses."""

        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:  # noqa: ARG002
            return self._healthz_api.healthz_service_get_healthz(_request_timeout=_ANSWER_SECONDS)

    # with host= given the client ignores in-cluster credentials, so they are passed on
    credentials: dict[str, Any] = {}
    token_path = Path(
        os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or "/var/run/secrets/kubeflow/pipelines/token"
    )
    if token := os.environ.get("KF_PIPELINES_TOKEN"):
        credentials["existing_token"] = token
    elif token_path.is_file():
        # read again for each request: the kubelet renews it
        credentials["credentials"] = kfp.client.ServiceAccountTokenVolumeCredentials(
            str(token_path)
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            client = Client(
                host=target.host, ui_host=target.ui, namespace=target.namespace or "", **credentials
            )
        client.get_kfp_healthz()
    except Exception as error:
        raise problem("the endpoint does not answer", target, error) from None
    return client


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
        PipelineError: the endpoint refused it.
    """
    try:
        with _quiet():
            pipeline_id = client.get_pipeline_id(name)
            if pipeline_id is None:
                pipeline_id = client.upload_pipeline(
                    str(package), pipeline_name=name, namespace=target.namespace
                ).pipeline_id
            versions = client.list_pipeline_versions(pipeline_id, page_size=100)
            for known in versions.pipeline_versions or []:
                if known.display_name == version:
                    return Registered(pipeline_id, known.pipeline_version_id, new=False)
            made = client.upload_pipeline_version(
                str(package), pipeline_version_name=version, pipeline_id=pipeline_id
            )
    except Exception as error:
        raise problem("the endpoint refused the pipeline", target, error) from None
    return Registered(pipeline_id, str(made.pipeline_version_id), new=True)


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
        PipelineError: the endpoint refused it.
    """
    what: dict[str, Any] = {"pipeline_package_path": str(package)}
    if registered:
        what = {"pipeline_id": registered.pipeline_id, "version_id": registered.version_id}
    try:
        with _quiet():
            run = client.run_pipeline(
                experiment_id=_experiment(client, target),
                job_name=run_name,
                params=dict(parameters),
                **what,
            )
    except Exception as error:
        raise problem("the endpoint refused the run", target, error) from None
    return str(run.run_id)


def submit_once(
    client: Any, target: Endpoint, package: Path, parameters: Mapping[str, Any], run_name: str
) -> str:
    """Start a run under a name that no other run has, unless it was started before; its id.

    The backend takes no id and no key from its caller, so the name tells: whoever stopped between
    the start and noting the id, or had no answer, finds the run by it.

    Raises:
        PipelineError: the endpoint refused it, or does not say whether it has it.
    """
    known = find_run(client, target, run_name)
    if known is not None:
        return known
    try:
        return submit(client, target, package, parameters, run_name)
    except PipelineError:
        # the answer may be what was lost, not the request
        if (started := find_run(client, target, run_name)) is None:
            raise
        return started


def find_run(client: Any, target: Endpoint, run_name: str) -> str | None:
    """Id of the oldest run of the experiment with this name.

    Raises:
        PipelineError: the endpoint does not answer.
    """
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": run_name}
    try:
        with _quiet():
            found = client.list_runs(
                experiment_id=_experiment(client, target),
                page_size=10,
                sort_by="created_at asc",
                filter=json.dumps({"predicates": [predicate]}),
            )
    except Exception as error:
        raise problem("the endpoint does not list its runs", target, error) from None
    named = [run for run in found.runs or [] if run.display_name == run_name]
    return str(named[0].run_id) if named else None


def schedule(
    client: Any,
    target: Endpoint,
    package: Path,
    parameters: Mapping[str, Any],
    run_name: str,
    cron: str,
) -> str:
    """Start runs at set times; returns the id of the recurring run.

    Args:
        client: From ``connect``.
        target: Where it is connected to.
        package: The compiled pipeline.
        parameters: Values of its parameters.
        run_name: Name in the UI.
        cron: Six fields, seconds first, as Kubeflow wants it.

    Raises:
        PipelineError: the endpoint refused it.
    """
    if len(cron.split()) != _CRON_FIELDS:
        raise ConfigError(
            f"the schedule {cron!r} has {len(cron.split())} fields",
            where="--schedule",
            fix='give six, seconds first: "0 0 3 * * *" is every night at three',
        )
    try:
        with _quiet():
            made = client.create_recurring_run(
                experiment_id=_experiment(client, target),
                job_name=run_name,
                cron_expression=cron,
                params=dict(parameters),
                pipeline_package_path=str(package),
                # a run that outlasts the interval is not joined by a second one
                max_concurrency=1,
                no_catchup=True,
            )
    except Exception as error:
        raise problem("the endpoint refused the schedule", target, error) from None
    return str(made.recurring_run_id)


def get_run(client: Any, target: Endpoint, run_id: str) -> Any:
    """A run as the API tells of it.

    Raises:
        RequestError: there is no such run.
        PipelineError: the endpoint does not answer.
    """
    try:
        return client.get_run(run_id)
    except Exception as error:
        raise _of_run(f"run {run_id} cannot be read", target, error) from None


def parameters_of(run: Any) -> dict[str, Any]:
    """Values of the parameters that a run was given."""
    return dict(getattr(run.runtime_config, "parameters", None) or {})


def retry(client: Any, target: Endpoint, run_id: str) -> None:
    """Let a failed run go on where it failed.

    Raises:
        RequestError: there is no such run, or it did not fail.
        PipelineError: the endpoint does not answer.
    """
    try:
        # the SDK has no public method for it (kubeflow/pipelines#9771)
        client._run_api.run_service_retry_run(run_id)
    except Exception as error:
        raise _of_run(f"run {run_id} cannot be retried", target, error) from None


def cancel(client: Any, target: Endpoint, run_id: str) -> None:
    """Ask the backend to terminate the run.

    Raises:
        RequestError: there is no such run.
        PipelineError: it has ended, or the endpoint does not answer.
    """
    try:
        client.terminate_run(run_id)
    except Exception as error:
        raise _of_run(f"run {run_id} cannot be cancelled", target, error) from None


def link(target: Endpoint, run_id: str) -> str:
    """The run's page in the UI."""
    return f"{target.ui}/#/runs/details/{run_id}"


def _experiment(client: Any, target: Endpoint) -> str:
    found = client.create_experiment(target.experiment, namespace=target.namespace)
    return str(found.experiment_id)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep kfp's own lines off stdout, which ``--output json`` promises to JSON."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


_FIXES = {
    401: "the token is missing or expired: renew it (KF_PIPELINES_TOKEN or the token volume)",
    403: "the account may not do this here: check namespace and role",
    404: "check the endpoint's path, the namespace and the run id",
    409: "look at its state in the UI",
}


def problem(what: str, target: Endpoint, error: Exception) -> PipelineError:
    """An exception of the client as one message with the endpoint's own words."""
    status = getattr(error, "status", None) or 0
    reason = _reason(error)
    fix = _FIXES.get(status, "check KF_PIPELINES_ENDPOINT and that the service is up")
    if status == _BAD_REQUEST:
        fix = "correct what the endpoint names; a package of another version has other parameters"
    code = f" (HTTP {status})" if status else ""
    return PipelineError(f"{what}: {reason}{code}", where=target.host, fix=fix)


def _of_run(what: str, target: Endpoint, error: Exception) -> PipelineError:
    """The same for a request about one run: that it is not there is a mistake of who asks."""
    found = problem(what, target, error)
    if getattr(error, "status", None) not in (404, 409):
        return found
    return RequestError(found.found, where=found.where, fix=found.fix)


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    if isinstance(body, str | bytes):
        try:
            return str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            pass
    lines = str(getattr(error, "reason", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
