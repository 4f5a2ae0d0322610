"""What configuration sections have in common: unknown keys fail, docstrings are descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from dpo.errors import holds_password

LARGEST_INTEGER = 2**53
"""Kubeflow's parameters are floating-point numbers: a larger integer may become another."""


class Section(BaseModel):
    """A group of settings. Immutable; unknown keys are errors; attribute docstrings describe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def refuse_passwords(values: Any, key: str = "") -> None:
    """Refuse settings that would write a password into every artifact of a run.

    Args:
        values: Settings: mappings, lists and scalars, however deep.
        key: Where they stand, for the message.

    Raises:
        ValueError: a URL has a user or a password in it.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            refuse_passwords(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for value in values:
            refuse_passwords(value, key)
    elif isinstance(values, str) and holds_password(values):
        raise ValueError(
            f"{key}: the URL has credentials in it, and settings are recorded in every artifact: "
            "leave them out here; they are read from their own variables (AWS_ACCESS_KEY_ID, "
            "HF_TOKEN, DPO_JUDGE_API_KEY, ...)"
        )


class Recorded(Section):
    """Settings that are written into artifacts and packages, which others read: no passwords."""

    @model_validator(mode="before")
    @classmethod
    def _no_passwords(cls, values: Any) -> Any:
        refuse_passwords(values)
        return values
