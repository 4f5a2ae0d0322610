"""Chat templates as transformers runs them, without transformers: what templates are given there.

One thing differs: ``strftime_now`` tells ``TODAY``, always.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TODAY = datetime(2024, 7, 26)
"""For templates that write the date: the day that those of Llama 3 take where they know none."""


def render(
    template: str, messages: Sequence[Mapping[str, str]], tokens: Mapping[str, str], *, open_: bool
) -> str:
    """``messages`` as the text that a model expects; templates run in Jinja's sandbox.

    Args:
        template: Its source.
        messages: With role and content.
        tokens: Special tokens by name.
        open_: Whether the text ends with the beginning of an answer.
    """
    return _compiled(template).render(
        messages=messages, tools=None, documents=None, add_generation_prompt=open_, **tokens
    )


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant said: nothing to a prompt."""

    tags = {"generation"}  # noqa: RUF012 - so Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a block of its own, so that what is set inside ends with it
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """One whose names do not lead into Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # a template may have a value of the name self
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _refuse_inner(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_inner(name)
        super().__setitem__(name, value)


def _refuse_inner(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"no name of a namespace may begin with an underscore: {name}")


@cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    # Jinja's own is for HTML: it would write < as \u003c
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = TODAY.strftime
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise ValueError(message)
