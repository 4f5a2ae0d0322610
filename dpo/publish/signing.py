"""Signatures of what is published; see ``dpo.storage.signing``, which reading steps share."""

from dpo.storage.signing import SIGNATURE, SIGNING_KEY, TRUSTED_KEYS, check, is_trusted, sign

__all__ = ["SIGNATURE", "SIGNING_KEY", "TRUSTED_KEYS", "check", "is_trusted", "sign"]
