"""Who calls: bearer tokens of the settings, or tokens of an OIDC issuer."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from pathlib import Path

import jwt

from dpo.errors import ConfigError
from pipelines.service.problems import Problem
from pipelines.service.settings import Settings
from pipelines.service.submission import COMMUNITY

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"]
_LEEWAY_SECONDS = 30
_CHALLENGE = 'Bearer realm="dpo", Basic realm="dpo: any name, the token as password"'


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str
    """For logs and limits; no secret."""
    communities: frozenset[str] | None
    """Those that it may act for; None stands for all."""


ANYBODY = Caller("local", None)
"""Whoever calls a service without tokens, which listens on loopback only."""


class Authenticator:
    """Finds the caller of a request.

    Raises:
        ConfigError: the file of tokens cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._protected = settings.protected
        self._tokens = _read_tokens(settings.tokens_file) if settings.tokens_file else {}
        if settings.token:
            self._tokens[_sha256(settings.token.get_secret_value())] = None
        self._oidc = _Issuer(settings) if settings.oidc_issuer else None

    def caller(self, authorization: str | None, *, reading: bool) -> Caller:
        """The caller behind an ``Authorization`` header.

        Args:
            authorization: The header.
            reading: The request changes nothing. Only then a browser's Basic credentials are taken
                (the token as password): a foreign page can make a browser send them.

        Raises:
            Problem: 401.
        """
        if not self._protected:
            return ANYBODY
        token = _token(authorization, basic=reading)
        if token is None:
            raise Problem(401, "a token is missing", headers={"WWW-Authenticate": _CHALLENGE})
        digest = _sha256(token)
        for known, communities in self._tokens.items():
            if hmac.compare_digest(known, digest):
                return Caller(f"token {digest[:8]}", communities)
        if self._oidc is not None and token.count(".") == 2:
            return self._oidc.caller(token)
        raise Problem(401, "the token is not known", headers={"WWW-Authenticate": _CHALLENGE})


class _Issuer:
    """An OIDC issuer; its keys are fetched when a token first needs them, and kept."""

    def __init__(self, settings: Settings) -> None:
        assert settings.oidc_issuer is not None
        self._issuer = settings.oidc_issuer
        self._audience = settings.oidc_audience
        self._claim = settings.oidc_claim
        self._keys: jwt.PyJWKClient | None = None

    def caller(self, token: str) -> Caller:
        try:
            key = self._key_client().get_signing_key_from_jwt(token)
            claims = jwt.decode(
                token,
                key.key,
                algorithms=_ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWKClientConnectionError, OSError):
            raise Problem(503, "the issuer of tokens does not answer") from None
        except (jwt.PyJWTError, TypeError) as error:
            # a TypeError where the token names an algorithm that the key is not for
            headers = {"WWW-Authenticate": 'Bearer realm="dpo", error="invalid_token"'}
            detail = f"the token is not accepted ({type(error).__name__})"
            raise Problem(401, detail, headers=headers) from None
        listed = claims.get(self._claim)
        names = listed.split() if isinstance(listed, str) else listed
        names = names if isinstance(names, list) else []
        allowed = {name for name in names if isinstance(name, str) and COMMUNITY.fullmatch(name)}
        return Caller(f"subject {_sha256(str(claims['sub']))[:8]}", frozenset(allowed))

    def _key_client(self) -> jwt.PyJWKClient:
        if self._keys is None:
            import urllib.request

            place = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
            # the issuer is a setting of the operator, not of a caller
            with urllib.request.urlopen(place, timeout=5) as answer:  # nosec B310
                text = answer.read()
            try:
                keys = json.loads(text)["jwks_uri"]
            except (ValueError, TypeError, KeyError):
                raise OSError(f"{place} names no jwks_uri") from None
            self._keys = jwt.PyJWKClient(keys, cache_keys=True, timeout=5)
        return self._keys


def _token(authorization: str | None, *, basic: bool) -> str | None:
    scheme, _, rest = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic" and basic:
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _read_tokens(path: Path) -> dict[str, frozenset[str] | None]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"the file of tokens cannot be read: {reason}", where=str(path)) from None
    found: dict[str, frozenset[str] | None] = {}
    for digest, communities in entries.items() if isinstance(entries, dict) else [("", None)]:
        names = communities if isinstance(communities, list) else []
        good = all(isinstance(name, str) and COMMUNITY.fullmatch(name) for name in names)
        if len(digest) != 64 or not ((good and names) or communities == "*"):
            raise ConfigError(
                "the file of tokens has an entry that is not understood",
                where=str(path),
                fix='write {"<sha256 of the token in hex>": ["community"] or "*"}',
            )
        found[digest.lower()] = frozenset(names) if names else None
    return found
