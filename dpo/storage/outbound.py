"""Calls to addresses that somebody else names: which are refused, and how the others are reached.

A name is resolved once, every address it has is checked, and the checked addresses are those that
are connected to: a name that means another address a moment later (DNS rebinding) gains nothing.
Redirects are never followed by those who call from here.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from dpo.errors import DpoError

_PORTS = {"http": 80, "https": 443}
_IPV4_IN_IPV6 = ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")
"""Networks whose last four bytes are an IPv4 address: two for translation (NAT64), one of old."""


class AddressRefused(DpoError):
    """An address that is not called."""


class NameUnknown(DpoError):
    """A host name that does not resolve."""


def web_url(url: str, what: str) -> SplitResult:
    """The parts of an ``http://`` or ``https://`` URL without credentials; no name is resolved yet.

    Args:
        url: What was given.
        what: The field or setting that holds it, for messages.

    Raises:
        AddressRefused: with the reason.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise AddressRefused(f"{what} is not a URL") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise AddressRefused(f"{what} must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise AddressRefused(f"{what} must not hold credentials")
    if any(ord(character) < 33 or ord(character) > 126 for character in url):
        raise AddressRefused(f"{what} holds a character that no URL has")
    return parts


def port_of(parts: SplitResult) -> int:
    """The port of a URL, or its scheme's."""
    return parts.port or _PORTS[parts.scheme]


def is_listed(parts: SplitResult, hosts: Collection[str]) -> bool:
    """Whether ``host`` or ``host:port`` of a URL is in a list of them."""
    host = (parts.hostname or "").lower()
    return bool({host, f"{host}:{port_of(parts)}"} & {item.lower() for item in hosts})


def addresses_of(host: str, port: int, what: str, *, private: bool) -> list[str]:
    """The addresses to call for a host name, in turn: checked, and to be used as they are.

    Args:
        host: Name or address, in any form that the system's resolver takes.
        port: Where to.
        what: The field or setting that holds it, for messages.
        private: Take addresses of private networks, loopback and link-local ones as well.

    Raises:
        AddressRefused: one of its addresses is not public.
        NameUnknown: the name does not resolve.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise NameUnknown(f"the host of {what} does not resolve") from None
    addresses = [str(item[4][0]) for item in found]
    if not private and not all(map(is_public, addresses)):
        raise AddressRefused(f"the host of {what} has a private address")
    return addresses


def is_public(address: str) -> bool:
    """Whether an address is reachable from the whole internet, and so is what is inside it."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        inner = [parsed.ipv4_mapped, parsed.sixtofour, *(parsed.teredo or ())]
        if any(parsed in ipaddress.ip_network(network) for network in _IPV4_IN_IPV6):
            inner.append(ipaddress.IPv4Address(parsed.packed[-4:]))
        hidden = [item for item in inner if item is not None]
        if hidden:
            return all(is_public(str(item)) for item in hidden)
    return parsed.is_global and not parsed.is_multicast


class _Connection(http.client.HTTPConnection):
    """Connects to the address that was checked."""

    def __init__(self, host: str, *, what: str, private: bool, **settings: Any) -> None:
        super().__init__(host, **settings)
        self._what, self._private = what, private

    def connect(self) -> None:
        """Resolve, check, connect to the first address that takes a connection."""
        *others, last = addresses_of(self.host, self.port, self._what, private=self._private)
        # localhost is ::1 as well, where few services listen
        for address in others:
            with suppress(OSError):
                self.sock = socket.create_connection((address, self.port), self.timeout)
                return
        self.sock = socket.create_connection((last, self.port), self.timeout)


class _SecureConnection(_Connection):
    """The same with TLS: the certificate must be the name's, although the address is called."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        """Resolve, check, connect, and see who is there."""
        super().connect()
        context = ssl.create_default_context()
        self.sock = context.wrap_socket(self.sock, server_hostname=self.host)


def connection_to(
    parts: SplitResult, what: str, *, private: bool, timeout_seconds: float
) -> http.client.HTTPConnection:
    """A connection to the host of a URL; connecting may raise what ``addresses_of`` raises."""
    kind = _SecureConnection if parts.scheme == "https" else _Connection
    host = parts.hostname or ""
    return kind(host, port=port_of(parts), what=what, private=private, timeout=timeout_seconds)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry keys and texts to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def http_open(self, req: urllib.request.Request) -> Any:
        # a proxy is the operator's choice, and resolves names by itself
        return super().http_open(req) if req.has_proxy() else self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def https_open(self, req: urllib.request.Request) -> Any:
        proxied = getattr(req, "_tunnel_host", None)
        return super().https_open(req) if proxied else self.do_open(self._connection, req)


def opener(what: str, *, private: bool) -> urllib.request.OpenerDirector:
    """An opener of urllib that follows no redirect and connects to checked addresses only."""
    how: dict[str, Any] = {"what": what, "private": private}
    return urllib.request.build_opener(
        _NoRedirect, _Http(partial(_Connection, **how)), _Https(partial(_SecureConnection, **how))
    )
