"""Credentials from the environment, checked before a library prints what it cannot send."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dpo.errors import ConfigError


def credential(environment: Mapping[str, str], name: str) -> str:
    """A variable without the newline that files end with; empty where it is not set.

    Raises:
        ConfigError: it cannot be one; without the text itself, which http.client would print.
    """
    text = environment.get(name, "").strip()
    if not re.fullmatch(r"[\x21-\x7e]*", text):
        raise ConfigError(
            f"{name} holds a character that no credential has",
            where=name,
            fix="set it to the credential alone, without spaces and newlines in it",
        )
    return text
