"""Runs on a Kubeflow Pipelines endpoint: submit, watch, read the verdict from the store.

The client's own waiting is not used: it hangs on a cancelled run (kubeflow/pipelines#14473) and
does not tell a failed run from a good one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.errors import PipelineError
from dpo.storage.runs import read_run_manifest
from pipelines.outcome import Outcome

_POLL_SECONDS = 5.0
_TRANSIENT_FAILURES = 12
_FINAL = {"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"}


@dataclass(frozen=True)
class Endpoint:
    """Where Kubeflow Pipelines answers."""

    host: str
    ui: str
    namespace: str | None
    experiment: str


def endpoint(
    host: str | None = None, namespace: str | None = None, experiment: str | None = None
) -> Endpoint:
    """An endpoint from arguments or the conventional environment variables.

    Raises:
        PipelineError: neither names one.
    """
    host = host or os.environ.get("KF_PIPELINES_ENDPOINT")
    if not host:
        raise PipelineError(
            "no Kubeflow Pipelines endpoint is given",
            fix="set KF_PIPELINES_ENDPOINT or pass --endpoint URL; to run here, pass --local",
        )
    return Endpoint(
        host=host.rstrip("/"),
        ui=(os.environ.get("KF_PIPELINES_UI_ENDPOINT") or host).rstrip("/"),
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

    # with host= given the client ignores in-cluster credentials, so they are passed on
    credentials: dict[str, Any] = {}
    token_path = Path(
        os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or "/var/run/secrets/kubeflow/pipelines/token"
    )
    if token := os.environ.get("KF_PIPELINES_TOKEN"):
        credentials["existing_token"] = token
    elif token_path.is_file():
        credentials["credentials"] = kfp.client.ServiceAccountTokenVolumeCredentials(
            str(token_path)
        )
    try:
        return kfp.Client(
            host=target.host, ui_host=target.ui, namespace=target.namespace or "", **credentials
        )
    except Exception as error:
        raise _problem("the endpoint does not answer", target, error) from None


def submit(
    client: Any,
    target: Endpoint,
    package: Path,
    parameters: Mapping[str, Any],
    run_name: str,
) -> str:
    """Start a run; returns its id.

    Raises:
        PipelineError: the endpoint refused it.
    """
    try:
        run = client.create_run_from_pipeline_package(
            str(package),
            arguments=dict(parameters),
            run_name=run_name,
            experiment_name=target.experiment,
            namespace=target.namespace,
        )
    except Exception as error:
        raise _problem("the endpoint refused the run", target, error) from None
    return str(run.run_id)


def link(target: Endpoint, run_id: str) -> str:
    """The run's page in the UI."""
    return f"{target.ui}/#/runs/details/{run_id}"


def wait(
    client: Any,
    target: Endpoint,
    run_id: str,
    *,
    store: str,
    timeout_seconds: float | None,
    say: Callable[[str], None],
) -> Outcome:
    """Poll until the run has ended or the time is over.

    Raises:
        PipelineError: the endpoint stopped answering, or the run was deleted.
    """
    deadline = time.monotonic() + timeout_seconds if timeout_seconds else None
    outcome = Outcome("timed out", run_id, where=link(target, run_id))
    failures = 0
    while deadline is None or time.monotonic() < deadline:
        try:
            run = client.get_run(run_id)
            failures = 0
        except Exception as error:
            failures += 1
            if failures >= _TRANSIENT_FAILURES or getattr(error, "status", None) in (401, 403, 404):
                raise _problem("the run cannot be read any more", target, error) from None
            time.sleep(_POLL_SECONDS)
            continue
        _report_steps(run, outcome, say)
        if run.state in _FINAL:
            return _ended(run, outcome, store)
        time.sleep(_POLL_SECONDS)
    outcome.message = f"the run has not ended after {timeout_seconds:.0f} s; it goes on"
    return outcome


def _report_steps(run: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    details = getattr(run.run_details, "task_details", None) or []
    for task in details:
        name, state = task.display_name, task.state
        if not name or name.endswith("-driver") or "executor" in name or not state:
            continue
        if outcome.steps.get(name) != state:
            outcome.steps[name] = state
            say(f"{name}: {state.lower()}")


def _ended(run: Any, outcome: Outcome, store: str) -> Outcome:
    history = [status.state for status in run.state_history or []]
    if run.state == "CANCELED" or "CANCELING" in history:
        outcome.state = "cancelled"
        return outcome
    if run.state != "SUCCEEDED":
        outcome.state = "failed"
        failed = [name for name, state in outcome.steps.items() if state == "FAILED"]
        error = getattr(run.error, "message", "") or ""
        outcome.message = f"failed: {', '.join(failed) or 'see the UI'} {error}".rstrip()
        return outcome
    # task outputs are empty in the run API (kubeflow/pipelines#9858): the store knows the verdict
    manifest = read_run_manifest(store, outcome.run_id)
    outcome.verdict = manifest["verdict"]
    outcome.published = manifest.get("published") or {}
    outcome.evaluation = manifest.get("evaluation") or {}
    outcome.state = "succeeded" if outcome.verdict["approved"] else "refused"
    return outcome


def cancel(client: Any, run_id: str) -> None:
    """Ask the backend to terminate the run."""
    client.terminate_run(run_id)


def _problem(what: str, target: Endpoint, error: Exception) -> PipelineError:
    status = getattr(error, "status", None)
    reason = getattr(error, "reason", None) or str(error).splitlines()[0]
    fixes = {
        401: "the token is missing or expired: renew it (KF_PIPELINES_TOKEN or the token volume)",
        403: "the account may not do this here: check namespace and role",
        404: "check the endpoint's path, the namespace and the run id",
    }
    fix = fixes.get(status or 0, "check KF_PIPELINES_ENDPOINT and that the service is up")
    code = f" (HTTP {status})" if status else ""
    return PipelineError(f"{what}: {reason}{code}", where=target.host, fix=fix)
