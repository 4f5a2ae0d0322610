"""Where an S3-compatible service is and who asks, from the conventional environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from dpo.errors import ConfigError
from dpo.storage.credentials import credential

GOOGLE_HOST = "storage.googleapis.com"


@dataclass(frozen=True)
class Connection:
    """How to reach the service, from the environment."""

    endpoint: str
    """Host with port."""
    secure: bool
    access_key: str | None
    secret_key: str | None
    session_token: str | None
    region: str | None


def connection(environment: Mapping[str, str] | None = None) -> Connection:
    """Endpoint and credentials from the conventional variables.

    ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``S3_ENDPOINT`` or ``MINIO_ENDPOINT`` (with or
    without ``http://``); ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, ``MINIO_ACCESS_KEY``
    and ``MINIO_SECRET_KEY``, or ``MINIO_ROOT_USER`` and ``MINIO_ROOT_PASSWORD``.

    Raises:
        ConfigError: an endpoint that is no address, or has credentials in it; a credential that
            cannot be one.
    """
    env = os.environ if environment is None else environment
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "S3_ENDPOINT", "MINIO_ENDPOINT")
    name, given = next(((n, env[n]) for n in names if env.get(n)), ("", "https://s3.amazonaws.com"))
    parts = _address(given, name)
    if "://" in given:
        secure = parts.scheme == "https"
    else:
        secure = env.get("MINIO_SECURE", "false").lower() in ("1", "true", "yes")
    keys = (
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY"),
        ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"),
    )
    access_name, secret_name = next(((a, s) for a, s in keys if env.get(a) and env.get(s)), keys[0])
    return Connection(
        endpoint=parts.netloc,
        secure=secure,
        access_key=credential(env, access_name) or None,
        secret_key=credential(env, secret_name) or None,
        session_token=credential(env, "AWS_SESSION_TOKEN") or None,
        region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
    )


def _address(given: str, name: str) -> SplitResult:
    """The parts of an endpoint.

    Raises:
        ConfigError: it is no address of a service.
    """
    problem = ""
    if "@" in given:
        raise ConfigError(
            "the endpoint of the store has credentials in it",
            where=name,
            fix="leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    try:
        parts = urlsplit(given if "://" in given else f"//{given}")
        # asking for the port checks it
        if not parts.hostname or parts.port == 0:
            problem = "it has no host, or the port 0"
    except ValueError as error:
        raise _no_address(str(error), name) from None
    if parts.scheme not in ("", "http", "https"):
        problem = f"its scheme is {parts.scheme}"
    elif parts.path.strip("/") or parts.query or parts.fragment:
        problem = "it has a path, a ? or a # part"
    if problem:
        raise _no_address(problem, name)
    return parts


def _no_address(problem: str, name: str) -> ConfigError:
    return ConfigError(
        f"the endpoint of the store is no address: {problem}",
        where=name,
        fix="write http://host:port or https://host:port",
    )


def google_connection(environment: Mapping[str, str] | None = None) -> Connection:
    """Google's endpoint (or ``GOOGLE_STORAGE_ENDPOINT``) and an HMAC key of a service account.

    ``GOOGLE_ACCESS_KEY_ID`` and ``GOOGLE_SECRET_ACCESS_KEY``, or the names of S3.

    Raises:
        ConfigError: an endpoint that is no address.
    """
    env = os.environ if environment is None else environment
    access, secret = env.get("GOOGLE_ACCESS_KEY_ID"), env.get("GOOGLE_SECRET_ACCESS_KEY")
    endpoint = {"AWS_ENDPOINT_URL": env.get("GOOGLE_STORAGE_ENDPOINT") or f"https://{GOOGLE_HOST}"}
    keys = {"AWS_ACCESS_KEY_ID": access or "", "AWS_SECRET_ACCESS_KEY": secret or ""}
    others = {name: value for name, value in env.items() if "ENDPOINT" not in name}
    # the service ignores the region, and one that is set saves a question
    return connection({**others, **endpoint, **(keys if access and secret else {}), **_AUTO})


_AUTO = {"AWS_REGION": "auto"}
