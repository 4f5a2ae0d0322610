"""A Kubeflow Pipelines endpoint: where it is, its client, and what it does with a run it has."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.errors import ConfigError, PipelineError, RequestError, holds_password
from pipelines.connection import bounded_client

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
        RequestError: the endpoint does not answer; nothing was started.
    """
    import kfp

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
            client = bounded_client(
                host=target.host, ui_host=target.ui, namespace=target.namespace or "", **credentials
            )
        client.get_kfp_healthz()
    except Exception as error:
        raise problem("the endpoint does not answer", target, error, RequestError) from None
    return client


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


def schedule_link(target: Endpoint, schedule_id: str) -> str:
    """The page of a recurring run in the UI."""
    return f"{target.ui}/#/recurringrun/details/{schedule_id}"


def experiment_id(client: Any, target: Endpoint) -> str:
    """Id of the experiment, which is made where it is missing."""
    found = client.create_experiment(target.experiment, namespace=target.namespace)
    return str(found.experiment_id)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep kfp's own lines off stdout, which ``--output json`` promises to JSON."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


_FIXES = {
    401: "the token is missing or expired: renew it (KF_PIPELINES_TOKEN or the token volume)",
    403: "the account may not do this here: check namespace and role",
    404: "check the endpoint's path, the namespace and the run id",
    409: "look at its state in the UI",
}


def problem(
    what: str, target: Endpoint, error: Exception, kind: type[PipelineError] = PipelineError
) -> PipelineError:
    """An exception of the client as one message with the endpoint's own words."""
    status = getattr(error, "status", None) or 0
    reason = _reason(error)
    fix = _FIXES.get(status, "check KF_PIPELINES_ENDPOINT and that the service is up")
    if status == _BAD_REQUEST:
        fix = "correct what the endpoint names; a package of another version has other parameters"
    code = f" (HTTP {status})" if status else ""
    return kind(f"{what}: {reason}{code}", where=target.host, fix=fix)


def _of_run(what: str, target: Endpoint, error: Exception) -> PipelineError:
    """The same for a request about one run: that it is not there is a mistake of who asks."""
    missing = getattr(error, "status", None) in (404, 409)
    return problem(what, target, error, RequestError if missing else PipelineError)


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    if isinstance(body, str | bytes):
        try:
            return str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            pass
    lines = str(getattr(error, "reason", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
