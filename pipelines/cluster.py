"""A Kubeflow Pipelines endpoint: where it is, its client, and what it does with a run it has."""

from __future__ import annotations

import json
import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpo.errors import ConfigError, PipelineError, RequestError, holds_password
from dpo.storage.credentials import credential
from dpo.storage.proxies import proxy_for
from pipelines.connection import NotTheApi, bounded_client
from pipelines.steps import PIPELINE

ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
"""States of a run that goes on no more."""
_CERTIFICATES = "SSL_CERT_FILE"
_UI = "KF_PIPELINES_UI_ENDPOINT"
_EXPERIMENT = "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"
_LONGEST_EXPERIMENT = 128
"""Its API server counts bytes (``validation/length.go``); a run's name may be longer."""
_TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"
_TOKEN_OF_A_POD = "/var/run/secrets/kubeflow/pipelines/token"
_BAD_REQUEST = 400
_NOT_AUTHENTICATED = 401
_REQUEST_TIMEOUT = 408
_CONFLICT = 409


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
        ConfigError: it has credentials in it, or is no URL of HTTP.
    """
    host = _given(host, "KF_PIPELINES_ENDPOINT")
    if not host:
        raise RequestError(
            "no Kubeflow Pipelines endpoint is given",
            fix="set KF_PIPELINES_ENDPOINT or pass --endpoint URL; to run here, pass --local",
        )
    host = _address(host, "KF_PIPELINES_ENDPOINT or --endpoint")
    ui = _given(None, _UI)
    ui = _address(ui, _UI) if ui else host
    if holds_password(host) or holds_password(ui):
        raise ConfigError(
            "the URL of the endpoint has credentials in it, and links to it are shown and logged",
            fix="leave them out and set KF_PIPELINES_TOKEN or KF_PIPELINES_SA_TOKEN_PATH",
        )
    return Endpoint(
        host=host.rstrip("/"),
        ui=ui.rstrip("/"),
        namespace=_given(namespace, "KF_PIPELINES_NAMESPACE") or None,
        experiment=_experiment(experiment),
    )


def _given(text: str | None, variable: str) -> str:
    """An argument or a variable, without the line's end that a file or a CI variable brings."""
    return (text or os.environ.get(variable) or "").strip()


def _experiment(given: str | None) -> str:
    name = _given(given, _EXPERIMENT) or PIPELINE
    if (length := len(name.encode())) > _LONGEST_EXPERIMENT:
        raise ConfigError(
            f"the name of the experiment has {length} bytes; Kubeflow takes {_LONGEST_EXPERIMENT}",
            where=f"--experiment or {_EXPERIMENT}",
            fix="write a shorter one",
        )
    return name


def _address(text: str, where: str) -> str:
    """An address as kfp takes it."""
    if "://" not in text:
        # kfp does the same, and warns of it
        text = f"https://{text}"
    # what a browser shows behind it is the UI's own
    scheme, _, rest = text.partition("#")[0].partition("://")
    # kfp takes another case for a name
    address = f"{scheme.lower()}://{rest}"
    if not _is_address(address):
        raise ConfigError(
            f"{address} is no address of an endpoint",
            where=where,
            fix="write http://NAME or https://NAME, with port and path where there are some",
        )
    return address


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # a port that is none raises where it is read
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and not re.search(r"[\s?]", url)


def connect(target: Endpoint) -> Any:
    """A KFP client; inside a cluster with the pod's own service account token.

    Raises:
        ConfigError: ``SSL_CERT_FILE`` or ``KF_PIPELINES_SA_TOKEN_PATH`` names no file, it or
            ``KF_PIPELINES_TOKEN`` holds no token, or the environment names a proxy of another kind.
        RequestError: the endpoint does not answer; nothing was started.
    """
    certificates = _certificates(target.host)
    # with host= given the client ignores in-cluster credentials, so they are passed on
    credentials: dict[str, Any] = {}
    named = os.environ.get(_TOKEN_FILE, "")
    if token := credential(os.environ, "KF_PIPELINES_TOKEN"):
        credentials["existing_token"] = token
    elif named or Path(_TOKEN_OF_A_POD).is_file():
        credentials["credentials"] = _TokenFile(Path(named or _TOKEN_OF_A_POD))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            client = bounded_client(
                host=target.host,
                ui_host=target.ui,
                namespace=target.namespace or "",
                ssl_ca_cert=certificates,
                **credentials,
            )
        client.get_kfp_healthz()
    except ConfigError:
        raise
    except Exception as error:
        raise problem("the endpoint does not answer", target, error, RequestError) from None
    return client


class _TokenFile:
    """What kfp asks for a token with each request: the kubelet renews the file.

    kfp's own passes on what is no token, which http.client then prints.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def refresh_api_key_hook(self, config: Any) -> None:
        """Put the token of now into the client's configuration.

        Raises:
            ConfigError: there is no file, or no token in it.
        """
        fix = f"name the file that holds it ({_TOKEN_FILE}), or set KF_PIPELINES_TOKEN"
        try:
            # what is no text is no token either
            text = self._path.read_text(encoding="ascii", errors="replace")
        except OSError as error:
            raise ConfigError(
                f"the token of the endpoint cannot be read: {error.strerror}",
                where=str(self._path),
                fix=fix,
            ) from None
        token = credential({str(self._path): text}, str(self._path))
        if not token:
            raise ConfigError(
                "the file of the endpoint's token is empty",
                where=str(self._path),
                fix=fix,
            )
        config.api_key["authorization"] = token


def _certificates(host: str) -> str | None:
    """The authorities that the environment names; kfp's client asks for none but its own list."""
    file = os.environ.get(_CERTIFICATES, "")
    if not file or not host.startswith("https://"):
        return None
    if not Path(file).is_file():
        raise ConfigError(
            f"{_CERTIFICATES} names no file: {file}",
            where=_CERTIFICATES,
            fix="name the file with the certificate of the endpoint's authority (PEM), or unset it",
        )
    return file


def get_run(client: Any, target: Endpoint, run_id: str) -> Any:
    """A run as the API tells of it.

    Raises:
        RequestError: there is no such run, or the endpoint does not answer; nothing was started.
    """
    try:
        return client.get_run(run_id)
    except Exception as error:
        raise problem(f"run {run_id} cannot be read", target, error, RequestError) from None


def parameters_of(run: Any) -> dict[str, Any]:
    """Values of the parameters that a run was given."""
    return dict(getattr(run.runtime_config, "parameters", None) or {})


def pipeline_of(client: Any, run: Any) -> str:
    """Name that the package of a run has; empty where the endpoint does not say it.

    A pipeline that somebody registered in the UI has any name there.
    """
    with suppress(Exception):
        sent = run.pipeline_spec
        if not sent:
            version = run.pipeline_version_reference
            sent = client.get_pipeline_version(
                version.pipeline_id, version.pipeline_version_id
            ).pipeline_spec
        # with settings of Kubernetes beside it, or alone
        return str(sent.get("pipeline_spec", sent)["pipelineInfo"]["name"])
    return ""


def cancel(client: Any, target: Endpoint, run_id: str) -> None:
    """Ask the backend to terminate the run; one that is ending already goes on to.

    Raises:
        RequestError: there is no such run, or it has ended.
        PipelineError: the endpoint does not answer.
    """
    try:
        client.terminate_run(run_id)
    except Exception as error:
        if not is_refusal(error):
            found = problem(f"the endpoint did not say that it ends run {run_id}", target, error)
            raise PipelineError(
                found.found, where=found.where, fix="send it again: a run may be asked to end twice"
            ) from None
        state = _state(client, run_id) if error_status(error) == _BAD_REQUEST else ""
        if state != "CANCELING":
            what = f"run {run_id} cannot be cancelled"
            raise _of_a_run(what, target, error, state if state in ENDED else "") from None


def _state(client: Any, run_id: str) -> str:
    """What a run is in, where the endpoint says so."""
    with suppress(Exception):
        return str(client.get_run(run_id).state or "")
    return ""


def not_retried(client: Any, target: Endpoint, run_id: str, error: Exception) -> RequestError:
    """Why the endpoint refused to let a run go on."""
    state = _state(client, run_id) if error_status(error) == _BAD_REQUEST else ""
    return _of_a_run(f"run {run_id} cannot be retried", target, error, state)


def _of_a_run(what: str, target: Endpoint, error: Exception, state: str) -> RequestError:
    found = problem(what, target, error)
    told = "it has ended" if state in ENDED else "only one that has failed can be retried"
    fix = f"its state is {state}: {told}" if state else found.fix
    return RequestError(found.found, where=found.where, fix=fix)


def error_status(error: Exception) -> int:
    """HTTP's code of an answer; 0 where there was none."""
    return getattr(error, "status", None) or 0


def is_refusal(error: Exception) -> bool:
    """Whether the endpoint said no, or was not reached at all; another answer, or none, leaves open
    what it did."""
    if isinstance(error, NotTheApi):
        return True
    status = error_status(error)
    return 400 <= status < 500 and status != _REQUEST_TIMEOUT


def link(target: Endpoint, run_id: str) -> str:
    """The run's page in the UI."""
    return f"{target.ui}/#/runs/details/{run_id}"


def schedule_link(target: Endpoint, schedule_id: str) -> str:
    """The page of a recurring run in the UI."""
    return f"{target.ui}/#/recurringrun/details/{schedule_id}"


def experiment_id(client: Any, target: Endpoint) -> str:
    """Id of the experiment, which is made where it is missing."""
    named = partial(client.create_experiment, target.experiment, namespace=target.namespace)
    try:
        return str(named().experiment_id)
    except Exception as error:
        if error_status(error) != _CONFLICT:
            raise
    # somebody made it since it was looked for: it is found now
    return str(named().experiment_id)


_FIXES = {
    _NOT_AUTHENTICATED: "the token is missing or expired: renew it (KF_PIPELINES_TOKEN or the "
    "token volume)",
    403: "the account may not do this here: check namespace and role",
    404: "check the endpoint's path, the namespace and the run id",
    409: "look at its state in the UI",
    429: "it wants to be asked less often: send it again later",
}
_FIX_OF_A_PAGE = (
    "if it asks people to sign in, give a token that it takes (KF_PIPELINES_TOKEN, or a token "
    "volume); else write the API's address, which is often the UI's with /pipeline behind it"
)


def problem(
    what: str, target: Endpoint, error: Exception, kind: type[PipelineError] = PipelineError
) -> PipelineError:
    """An exception of the client as one message with the endpoint's own words."""
    status = error_status(error)
    reason = _reason(error)
    fix = _FIXES.get(status, "check KF_PIPELINES_ENDPOINT and that the service is up")
    if not status and (proxy := _proxy(target)):
        fix += f", and the proxy {proxy}, through which it is asked (NO_PROXY names exceptions)"
    if isinstance(error, NotTheApi):
        fix = _FIX_OF_A_PAGE
    if status == _NOT_AUTHENTICATED and target.host.startswith("http://"):
        fix += "; if http:// leads on to https:// there, write the latter: no token follows"
    if "WRONG_VERSION_NUMBER" in reason:
        fix = "it speaks no TLS there: write http:// before its name if that is meant"
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        fix = f"set {_CERTIFICATES} to the file with the certificate of its authority (PEM)"
    if status == _BAD_REQUEST:
        fix = "correct what the endpoint names; a package of another version has other parameters"
        if "empty namespace" in reason:
            fix = "name the profile of the run: --namespace NAME, or KF_PIPELINES_NAMESPACE"
    code = f" (HTTP {status})" if status else ""
    return kind(f"{what}: {reason}{code}", where=target.host, fix=fix)


def _proxy(target: Endpoint) -> str:
    """The address of the proxy on the way to the endpoint, if there is one."""
    with suppress(ConfigError):
        if proxy := proxy_for(target.host):
            return proxy.address
    return ""


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    if isinstance(body, str | bytes):
        try:
            return str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            pass
    lines = str(getattr(error, "reason", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
