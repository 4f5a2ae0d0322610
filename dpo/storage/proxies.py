"""The proxy that the environment names for an address, read as curl and requests read it."""

from __future__ import annotations

import urllib.request
from typing import NamedTuple
from urllib.parse import unquote, urlsplit, urlunsplit

_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class Proxy(NamedTuple):
    """A proxy; its address may be shown, for its credentials are in the headers alone."""

    address: str
    headers: dict[str, str]


def proxy_for(url: str) -> Proxy | None:
    """From ``HTTPS_PROXY``, ``HTTP_PROXY`` or ``ALL_PROXY``; None where there is none.

    ``NO_PROXY`` names hosts that are reached directly; this machine always is.

    Args:
        url: Of the service, with ``http://`` or ``https://``.
    """
    wanted = urlsplit(url)
    if wanted.hostname in _THIS_MACHINE or urllib.request.proxy_bypass(wanted.netloc):
        return None
    known = urllib.request.getproxies()
    found = known.get(wanted.scheme) or known.get("all")
    if not found:
        return None
    parts = urlsplit(found if "://" in found else f"http://{found}")
    return Proxy(
        urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], "", "", "")),
        _credentials(parts.username, parts.password),
    )


def _credentials(user: str | None, password: str | None) -> dict[str, str]:
    from urllib3.util import make_headers

    if user is None:
        return {}
    return dict(make_headers(proxy_basic_auth=f"{unquote(user)}:{unquote(password or '')}"))
