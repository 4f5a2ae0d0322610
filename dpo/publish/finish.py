"""The end of a run: its manifest says how it went, and a notification URL is called.

Whom to call is set by the administrator in the environment of the last steps (``DPO_NOTIFY_URL``,
``DPO_NOTIFY_SECRET``): no text of a user becomes an address. Redirects are not followed.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import os
import ssl
from datetime import UTC, datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from dpo.errors import ConfigError, DpoError, PipelineError
from dpo.storage.outbound import port_of
from dpo.storage.progress import message
from dpo.storage.proxies import Proxy, proxy_for
from dpo.storage.runs import MANIFEST_NAME, run_prefix, stored_run_manifest, write_run_manifest
from dpo.storage.store import Store, open_store

URL_VARIABLE = "DPO_NOTIFY_URL"
SECRET_VARIABLE = "DPO_NOTIFY_SECRET"  # nosec B105
SIGNATURE = "X-DPO-Signature"
"""``sha256=`` and the HMAC-SHA256 of the body, in hex, as the service signs its callbacks."""
_TIMEOUT_SECONDS = 10.0
_GOOD_STATES = {"SUCCEEDED", "COMPLETE", "CACHED"}
_GOOD_ENDS = {"succeeded", "refused"}


def run_finish(store_url: str, run_id: str, state: str, reason: str = "") -> dict[str, Any]:
    """Write how the run ended into its manifest, then tell the notification URL if one is set.

    Args:
        store_url: Where the run publishes to; may be empty or unreachable for a run that failed.
        run_id: Names the run's folder in the store. Where both are empty, in a pipeline of somebody
            else, nothing is written, and the backend's word is all that is known.
        state: What the backend says of the steps: SUCCEEDED, COMPLETE, FAILED, CANCELED or others.
        reason: What the backend says of a failure.

    Returns:
        The message that was sent, or would be.

    Raises:
        DpoError: the store cannot be read or written to although the run succeeded.
    """
    store = open_store(store_url) if store_url else None
    known, unread = _known(store, run_id)
    if unread and state in _GOOD_STATES:
        # with nothing known it would be told, and written once the store is back, as a failure
        raise unread
    alone = not (store_url or run_id)
    ended = {
        "state": _how_it_ended(known, state, alone=alone),
        "backend_state": state,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if reason:
        ended["reason"] = reason
    text = _message(store, run_id, known, ended)
    ended["notification"] = _notify(text)
    try:
        if alone:
            message("finish", "no store and no run_id is given: the run's end is written nowhere")
        elif store is None:
            raise ConfigError("the run has no store, so its end is written nowhere")
        elif unread:
            raise unread
        else:
            write_run_manifest(store, run_id, **ended)
    except DpoError as error:
        if state in _GOOD_STATES or ended["state"] in _GOOD_ENDS:
            raise
        # the run has failed already, perhaps because of the same store
        message("finish", str(error))
    message("finish", f"the run ended: {ended['state']}; notification: {ended['notification']}")
    return text


def tell_of_retry(store: Store, run_id: str, step: str) -> None:
    """Tell how a run ended that was told to have failed, and that went on.

    Kubeflow runs no ``finish`` after a retry, for it carries the first one over as done (tried with
    Argo's controller 4.0.5). What ``finish`` alone writes shows that there was one.

    Args:
        store: Where the run's manifest lies, with its end.
        run_id: Names the run's folder in the store.
        step: Who says so.
    """
    try:
        known = stored_run_manifest(store, run_id)
        if "notification" not in known or not os.environ.get(URL_VARIABLE):
            return
        sent = _notify(_message(store, run_id, known, known))
        message(step, f"the run went on and ended: {known['state']}; notification: {sent}")
        write_run_manifest(store, run_id, notification=sent)
    except DpoError as error:
        # the run is what it is whoever hears of it
        message(step, str(error))


def _known(store: Store | None, run_id: str) -> tuple[dict[str, Any], DpoError | None]:
    """What the run's manifest holds, and why that cannot be read."""
    try:
        return (stored_run_manifest(store, run_id) if store else {}), None
    except DpoError as error:
        return {}, error


def _how_it_ended(known: dict[str, Any], state: str, *, alone: bool) -> str:
    """By what the steps wrote, if they had a place for it: Kubeflow may go on to say FAILED of a
    group in which a step failed once and was then tried again with success
    (kubeflow/pipelines#13591)."""
    if state in ("CANCELED", "CANCELLED"):
        return "cancelled"
    if alone:
        return "succeeded" if state in _GOOD_STATES else "failed"
    verdict = known.get("verdict")
    if not verdict:
        return "failed"
    if not verdict.get("approved"):
        return "refused"
    return "succeeded" if known.get("published") else "failed"


def _message(
    store: Store | None, run_id: str, known: dict[str, Any], ended: dict[str, Any]
) -> dict[str, Any]:
    published = known.get("published") or {}
    return {
        "event": "run.ended",
        "run_id": run_id,
        "state": ended["state"],
        "ended": ended["ended"],
        "approved": (known.get("verdict") or {}).get("approved"),
        "name": published.get("name"),
        "content_hash": published.get("content_hash"),
        "url": published.get("url"),
        "manifest": store.url(f"{run_prefix(run_id)}/{MANIFEST_NAME}") if store else None,
    }


def _notify(text: dict[str, Any]) -> str:
    """Post the message; returns what became of it. A run is what it is whoever hears of it."""
    url = os.environ.get(URL_VARIABLE, "")
    if not url:
        return "none asked for"
    try:
        return f"sent, answered with {_post(url, json.dumps(text, sort_keys=True).encode())}"
    except (OSError, http.client.HTTPException) as error:
        return f"failed: {type(error).__name__}"
    except ValueError:
        # a port that is no number, a name that is none
        return f"failed: {URL_VARIABLE} is not a URL that can be called"
    except DpoError as error:
        return f"failed: {error.found}"


def _post(url: str, body: bytes) -> int:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ConfigError(f"{URL_VARIABLE} is not an http:// or https:// URL without credentials")
    headers = {"Content-Type": "application/json", "User-Agent": "dpo-pipeline"}
    # a Secret that was made of a file ends in the file's line end
    if secret := os.environ.get(SECRET_VARIABLE, "").strip():
        digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
        headers[SIGNATURE] = f"sha256={digest}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    proxy = proxy_for(url)
    connection = _connection(parts, proxy)
    if proxy and parts.scheme == "http":
        # asked for the whole address; of https:// it sees the host alone
        target, headers = f"http://{parts.netloc}{target}", {**headers, **proxy.headers}
    try:
        connection.request("POST", target, body, headers)
        status = connection.getresponse().status
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise PipelineError(f"answered with status {status}")
    return status


def _connection(parts: SplitResult, proxy: Proxy | None) -> http.client.HTTPConnection:
    """To the receiver, by the proxy that the environment names."""
    way = urlsplit(proxy.address) if proxy else parts
    host, port = str(way.hostname), port_of(way)
    if parts.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_SECONDS)
    context = ssl.create_default_context()
    connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_SECONDS, context=context)
    if proxy:
        connection.set_tunnel(str(parts.hostname), parts.port, proxy.headers)
    return connection
