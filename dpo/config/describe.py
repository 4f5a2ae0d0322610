"""Turns pydantic's findings into one message that names key, value and choices."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from dpo.errors import ConfigError

_TYPE = re.compile(r"literal\[|list\[|constrained-\w+$")
"""How pydantic calls one of several types that a value may have, as if it were a key."""
_NO_BOOLEAN = ("bool_parsing", "bool_type")
_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type")


def validation_error(
    error: ValidationError,
    schema: type[BaseModel],
    *,
    where: str | None = None,
    fix: str = "`dpo config` prints every key with its value",
) -> ConfigError:
    """One ConfigError for all that ``error`` found.

    Args:
        error: pydantic's findings.
        schema: The class that was validated, to suggest keys from.
        where: File or command that the values came from.
        fix: Where the keys are listed.
    """
    problems: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        head, problem = _finding(item, schema)
        # a value that fits none of several types is reported once for each
        problems.setdefault(head, []).extend([problem] if problem else [])
    lines = [f"{head}: {' or '.join(each)}" if each else head for head, each in problems.items()]
    found = lines[0] if len(lines) == 1 else "\n  ".join(["settings that cannot work:", *lines])
    return ConfigError(found, where=where, fix=fix)


def _finding(item: Any, schema: type[BaseModel]) -> tuple[str, str]:
    """Key with value, and what is wrong with it; or all in the first."""
    path = [str(part) for part in item["loc"]]
    kind = item["type"]
    if kind == "extra_forbidden":
        loss = path[1] if path[0] == "loss" and len(path) > 2 else None
        section, path = _section_at(schema, path)
        if loss and path[-1] in _options_of_losses(schema):
            options = ", ".join(name for name in section if name != "name") or "none"
            return f"{'.'.join(path)}: the loss {loss} ignores it (its options: {options})", ""
        key = ".".join(path)
        return f"unknown key {key}{suggestion(path[-1], section, key[: -len(path[-1])])}", ""
    if kind == "value_error":
        return str(item["ctx"]["error"]), ""
    if kind == "union_tag_invalid":
        return f"loss={item['ctx']['tag']}: the choices are {item['ctx']['expected_tags']}", ""
    if kind == "union_tag_not_found":
        return "loss.name is missing: choose a loss, such as loss=dpo", ""
    key = ".".join(_without_tags(path))
    return f"{key}={item['input']!r}", _problem(item, schema, key)


def _problem(item: Any, schema: type[BaseModel], key: str) -> str:
    """What is wrong with a value, in words of YAML where pydantic speaks of Python's types."""
    kind, given = item["type"], item["input"]
    if kind in _NO_BOOLEAN:
        return "write true or false"
    if kind in _NO_MAPPING:
        keys, _ = _section_at(schema, [*map(str, item["loc"]), ""])
        return f"input should be a mapping with keys of its own{_listed(keys)}"
    if kind == "string_type" and isinstance(given, int | float):
        # what YAML reads without quotes is a number or a truth value
        text = str(given).lower()
        # nobody sets one item of a list
        is_item = any(isinstance(part, int) for part in item["loc"])
        shell = "" if is_item else f", in a shell '{key}=\"{text}\"'"
        return f"input should be a text: write it in quotes{shell}"
    message = str(item["msg"])
    return f"{message[:1].lower()}{message[1:]}"


def _listed(keys: list[str]) -> str:
    return f": {', '.join(keys)}" if keys else ""


def suggestion(key: str, choices: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean X?)``, or the choices when nothing is near."""
    known = sorted(choices)
    if near := nearest(key, known, prefix):
        return near
    return f": the choices are {', '.join(known)}" if known else ""


def nearest(key: str, choices: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean X?)``, or nothing."""
    near = difflib.get_close_matches(key, sorted(choices), n=1, cutoff=0.6)
    return f" (did you mean {prefix}{near[0]}?)" if near else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _options_of_losses(schema: type[BaseModel]) -> set[str]:
    """What some loss takes: for another loss such a key is no typo, but it would do nothing."""
    losses = _models_in(schema.model_fields["loss"].annotation)
    return {name for loss in losses for name in loss.model_fields}


def _without_tags(path: list[str]) -> list[str]:
    """``loss.dpo.beta`` as pydantic reports it is ``loss.beta`` as people write it."""
    if len(path) > 1 and path[0] == "loss":
        return [path[0], *path[2:]]
    return [part for part in path if not _TYPE.match(part)]


def _section_at(schema: type[BaseModel], path: list[str]) -> tuple[list[str], list[str]]:
    """The keys known at the parent of ``path``, and the path as people write it."""
    section: type[BaseModel] | None = schema
    for part in path[:-1]:
        field = section.model_fields.get(part) if section else None
        if field is not None:
            models = _models_in(field.annotation)
            section = models[0] if len(models) == 1 else None
            union = models
        elif section is None:
            section = next((m for m in union if m.model_fields["name"].default == part), None)
    keys = list(section.model_fields) if section else []
    return keys, _without_tags(path)
