"""Callbacks: which addresses may be called, and the signed call when a run has ended."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import json
import socket
import ssl
from typing import Any
from urllib.parse import SplitResult, urlsplit

from dpo.errors import DpoError
from pipelines.service.settings import Settings

SIGNATURE = "X-DPO-Signature"
_TIMEOUT_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}


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
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError:
        raise CallbackRefused("callbackUrl is not a URL") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise CallbackRefused("callbackUrl must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise CallbackRefused("callbackUrl must not hold credentials")
    if any(ord(character) < 33 or ord(character) > 126 for character in url):
        raise CallbackRefused("callbackUrl holds a character that no URL has")
    host = parts.hostname.lower()
    if not {host, f"{host}:{port}"} & {item.lower() for item in settings.callback_hosts}:
        raise CallbackRefused("the host of callbackUrl is not on this service's allow list")
    return parts


def address_of(parts: SplitResult, settings: Settings) -> tuple[str, int]:
    """The address to call: resolved once, checked, and then used as it is.

    A name that resolves to another address between check and call would defeat the check.

    Raises:
        CallbackRefused: an address of a private network.
        CallbackFailed: the name does not resolve.
    """
    assert parts.hostname is not None
    port = parts.port or _PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError:
        raise CallbackFailed("the host of callbackUrl does not resolve") from None
    addresses = [str(item[4][0]) for item in found]
    for address in addresses:
        if not settings.callback_private and not _is_public(address):
            raise CallbackRefused("the host of callbackUrl has a private address")
    return addresses[0], port


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    parsed = mapped or parsed
    return parsed.is_global and not parsed.is_multicast


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
    address, port = address_of(parts, settings)
    assert settings.callback_secret is not None
    body = json.dumps(message, sort_keys=True).encode()
    headers = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "User-Agent": "dpo-pipeline",
        SIGNATURE: sign(body, settings.callback_secret.get_secret_value()),
    }
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _connection(parts, address, port)
    try:
        connection.request("POST", target, body, headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise CallbackFailed(f"the callback had no answer: {type(error).__name__}") from None
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise CallbackFailed(f"the callback was answered with status {status}")
    return status


def _connection(parts: SplitResult, address: str, port: int) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address, port, timeout=_TIMEOUT_SECONDS)
    if parts.scheme == "https":
        plain = socket.create_connection((address, port), _TIMEOUT_SECONDS)
        context = ssl.create_default_context()
        # the certificate must be that of the name, although the address is called
        connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname)
    return connection
