"""Signatures of manifests and of ``latest.json`` with an Ed25519 key from the environment.

    DPO_SIGNING_KEY     private key (PEM, PKCS 8): ``openssl genpkey -algorithm ed25519``
    DPO_TRUSTED_KEYS    public keys (PEM, one after the other): ``openssl pkey -in key.pem -pubout``

Whoever signs needs the first; whoever verifies the second, which is no secret. A signature covers
the canonical JSON of everything else in it: of a manifest the sha256 of every file, of
``latest.json`` the model's name and the version that readers get.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from dpo.errors import ArtifactError, ConfigError

SIGNING_KEY = "DPO_SIGNING_KEY"
TRUSTED_KEYS = "DPO_TRUSTED_KEYS"
SIGNATURE = "signature"
_ALGORITHM = "ed25519"
_PEM = re.compile(r"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----", re.DOTALL)


def sign(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a signature, or as it is where no key is set.

    Raises:
        ConfigError: the key is not an Ed25519 private key.
    """
    bare = {name: value for name, value in manifest.items() if name != SIGNATURE}
    text = os.environ.get(SIGNING_KEY)
    if not text:
        return bare
    key = _key(text, SIGNING_KEY)
    if not key.has_private():
        raise _wrong_key(SIGNING_KEY)
    from Crypto.Signature import eddsa  # nosec B413

    value = eddsa.new(key, "rfc8032").sign(_canonical(bare))
    signature = {
        "algorithm": _ALGORITHM,
        "key_id": _key_id(key),
        "value": base64.b64encode(value).decode(),
    }
    return {**bare, SIGNATURE: signature}


def has_keys() -> bool:
    """Whether a key is trusted here, so that what none signed is refused.

    Raises:
        ConfigError: a key that is set cannot be read.
    """
    return bool(_trusted())


def is_trusted(manifest: Mapping[str, Any]) -> bool:
    """Whether a key that is trusted here signed these values; True where no key is set.

    Raises:
        ConfigError: a key that is set cannot be read.
    """
    keys = _trusted()
    return not keys or _signer(manifest, keys) is not None


def check(manifest: Mapping[str, Any], where: str, what: str = "the manifest") -> str:
    """What there is to say of the signature of a manifest, or of ``what``.

    Raises:
        ArtifactError: keys are set and none of them signed it.
        ConfigError: a key that is set cannot be read.
    """
    keys = _trusted()
    key_id = _signature(manifest).get("key_id", "")
    if not keys:
        if key_id:
            return f"signed by key {key_id}, which was not checked: {TRUSTED_KEYS} is not set"
        return "not signed"
    if _signer(manifest, keys):
        return f"signed by key {key_id}, which is trusted"
    raise ArtifactError(
        f"{what}'s signature is wrong" if key_id in keys else _untrusted(key_id, what),
        where=where,
        fix="do not use this model, or "
        + (
            f"add the key of whoever signed it to {TRUSTED_KEYS}"
            if key_id
            else f"publish it again with {SIGNING_KEY} set (no file moves)"
        ),
    )


def _untrusted(key_id: str, what: str) -> str:
    if not key_id:
        return f"{what} is not signed"
    return f"{what} is signed by key {key_id}, which is not trusted here"


def _signer(manifest: Mapping[str, Any], keys: Mapping[str, Any]) -> str | None:
    from Crypto.Signature import eddsa  # nosec B413

    signature = _signature(manifest)
    key = keys.get(signature.get("key_id", ""))
    if key is None or signature.get("algorithm") != _ALGORITHM:
        return None
    bare = {name: value for name, value in manifest.items() if name != SIGNATURE}
    try:
        value = base64.b64decode(signature.get("value", ""), validate=True)
        eddsa.new(key, "rfc8032").verify(_canonical(bare), value)
    except ValueError:
        return None
    return signature["key_id"]


def _signature(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a signature; none where there is something else in its place."""
    found = manifest.get(SIGNATURE)
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _trusted() -> dict[str, Any]:
    """Public keys by their ids: those that are trusted, and that of the signing key."""
    found = {}
    for name in (SIGNING_KEY, TRUSTED_KEYS):
        if text := os.environ.get(name):
            blocks = _PEM.findall(text.replace("\\n", "\n"))
            if not blocks:
                raise _wrong_key(name)
            for block in blocks:
                key = _key(block, name).public_key()
                found[_key_id(key)] = key
    return found


def _key(text: str, name: str) -> Any:
    from Crypto.PublicKey import ECC  # nosec B413

    try:
        # a newline is often written as \n where a variable holds one line
        key = ECC.import_key(text.replace("\\n", "\n"))
    except (ValueError, IndexError, TypeError):
        raise _wrong_key(name) from None
    if key.curve != "Ed25519":
        raise _wrong_key(name)
    return key


def _wrong_key(name: str) -> ConfigError:
    kind = "private key" if name == SIGNING_KEY else "public key"
    return ConfigError(
        f"{name} is not an Ed25519 {kind} in PEM form",
        where=name,
        fix="make one with `openssl genpkey -algorithm ed25519`; `openssl pkey -pubout` gives its "
        "public part",
    )


def _key_id(key: Any) -> str:
    return hashlib.sha256(key.public_key().export_key(format="raw")).hexdigest()[:16]


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
