"""The proxy that the environment names for an address, read as curl and requests read it."""

from __future__ import annotations

import ipaddress
import urllib.request
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from dpo.errors import ConfigError

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class Proxy(NamedTuple):
    """A proxy; its address may be shown, for its credentials are in the headers alone."""

    address: str
    headers: dict[str, str]


def proxy_for(url: str) -> Proxy | None:
    """From ``HTTPS_PROXY``, ``HTTP_PROXY`` or ``ALL_PROXY``; None where there is none.

    ``NO_PROXY`` names hosts, domains and networks that are reached directly; this machine always
    is.

    Args:
        url: Of the service, with ``http://`` or ``https://``.

    Raises:
        ConfigError: a proxy of another kind (SOCKS), or no address of one.
    """
    wanted, known = urlsplit(url), urllib.request.getproxies()
    if wanted.hostname in _THIS_MACHINE or urllib.request.proxy_bypass(wanted.netloc):
        return None
    if _is_in(wanted.hostname or "", known.get("no", "")):
        return None
    kind = wanted.scheme if known.get(wanted.scheme) else "all"
    found = known.get(kind)
    if not found:
        return None
    parts = urlsplit(found if "://" in found else f"http://{found}")
    _check(parts, f"{kind.upper()}_PROXY", wanted.hostname or "")
    return Proxy(
        urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "", "", "")),
        _credentials(parts.username, parts.password),
    )


def _is_in(host: str, networks: str) -> bool:
    """Whether an address is in one of the networks (``10.0.0.0/8``), as ``NO_PROXY`` lists them."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for name in networks.split(","):
        with suppress(ValueError):
            if address in ipaddress.ip_network(name.strip().strip("[]"), strict=False):
                return True
    return False


def _check(proxy: SplitResult, variable: str, host: str) -> None:
    # its value may hold a password, so it is not shown
    if proxy.scheme not in ("http", "https"):
        found = f"a proxy with {proxy.scheme}:// is not supported"
    elif not _has_address(proxy):
        found = "this is no address of a proxy"
    else:
        return
    raise ConfigError(
        found,
        where=f"{variable} in the environment",
        fix=f"name one with http:// (a / or @ in its password as %2F or %40), or add {host} to "
        "NO_PROXY",
    )


def _has_address(proxy: SplitResult) -> bool:
    try:
        return bool(proxy.hostname) and proxy.port != 0
    except ValueError:
        # a port that is no number
        return False


def _credentials(user: str | None, password: str | None) -> dict[str, str]:
    from urllib3.util import make_headers

    if user is None:
        return {}
    return dict(make_headers(proxy_basic_auth=f"{unquote(user)}:{unquote(password or '')}"))
