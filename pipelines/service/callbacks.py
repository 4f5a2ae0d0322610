"""Callbacks: which addresses may be called, and the signed call when a run has ended."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
from typing import Any
from urllib.parse import SplitResult

from dpo.errors import DpoError
from dpo.storage import outbound
from pipelines.service.settings import Settings

SIGNATURE = "X-DPO-Signature"
_TIMEOUT_SECONDS = 10.0
_WHAT = "callbackUrl"


class CallbackRefused(DpoError):
    """An address that the service does not call."""


class CallbackFailed(DpoError):
    """The address did not answer with success."""


def check_url(url: str, settings: Settings) -> SplitResult:
    """The parts of a callback URL that the settings allow; no name is resolved yet.

    Raises:
        CallbackRefused: with the reason.
    """
    try:
        parts = outbound.web_url(url, _WHAT)
    except outbound.AddressRefused as error:
        raise CallbackRefused(error.found) from None
    if not outbound.is_listed(parts, settings.callback_hosts):
        raise CallbackRefused("the host of callbackUrl is not on this service's allow list")
    return parts


def sign(body: bytes, secret: str) -> str:
    """``sha256=`` and the HMAC-SHA256 of the body, in hex."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def call(url: str, message: dict[str, Any], settings: Settings) -> int:
    """Post ``message`` and return the status; redirects are not followed.

    Raises:
        CallbackRefused: the address is not allowed (any more).
        CallbackFailed: no answer, or one that is not 2xx.
    """
    parts = check_url(url, settings)
    assert settings.callback_secret is not None
    body = json.dumps(message, sort_keys=True).encode()
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": "dpo-pipeline",
        SIGNATURE: sign(body, settings.callback_secret.get_secret_value()),
    }
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = outbound.connection_to(
        parts, _WHAT, private=settings.callback_private, timeout_seconds=_TIMEOUT_SECONDS
    )
    try:
        connection.request("POST", target, body, headers)
        status = connection.getresponse().status
    except outbound.AddressRefused as error:
        raise CallbackRefused(error.found) from None
    except outbound.NameUnknown as error:
        raise CallbackFailed(error.found) from None
    except (OSError, http.client.HTTPException) as error:
        raise CallbackFailed(f"the callback had no answer: {type(error).__name__}") from None
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise CallbackFailed(f"the callback was answered with status {status}")
    return status
