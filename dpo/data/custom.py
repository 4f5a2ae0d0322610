"""Formats of the user's own: a function named ``module:function`` in a source's settings.

As ``format`` it reads one row:

    def mine(row):
        return {"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"]}

As ``loader`` it has the form of the reference code: called with ``split``, ``silent`` and
``cache_dir``, it returns a mapping from prompt to ``responses`` (texts), ``pairs`` (indices of the
better and the worse response) and ``sft_target``.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from dpo.data import formats
from dpo.data.formats import Candidate, Parser, Rating, RowError
from dpo.errors import ConfigError, DataError
from dpo.storage.manifest import sha256_file


def row_parser(name: str) -> Parser:
    """The function ``name`` as a parser. What it returns is a pair, a list of them, or none.

    Raises:
        ConfigError: there is no such function.
    """
    function = _function(name)

    def parse(row: Mapping[str, Any]) -> Sequence[Candidate | Rating]:
        try:
            found = function(row)
        except RowError:
            raise
        except Exception as error:
            raise RowError(
                "custom_format_failed", f"{name} raised {type(error).__name__}: {error}"
            ) from None
        items = found if isinstance(found, list) else [found]
        if not items or not all(isinstance(item, Mapping) for item in items):
            raise RowError(
                "custom_format_failed",
                f"{name} returned no pair: return {{prompt, chosen, rejected}} or a list of them",
            )
        return [pair for item in items for pair in formats.pairs(item)]

    return parse


def load_rows(name: str, source: str) -> Iterator[dict[str, Any]]:
    """The pairs of a loader, as rows with their split.

    Raises:
        ConfigError: there is no such function.
        DataError: it fails, or returns something else.
    """
    function = _function(name)
    for split in ("train", "test"):
        try:
            data = function(split, silent=True, cache_dir=None)
            for prompt, entry in data.items():
                responses = entry["responses"]
                if not entry["pairs"]:
                    # the reference code's SFT takes it: here it goes, and is counted
                    yield {"prompt": prompt, "responses": responses, "pairs": []}
                for better, worse in entry["pairs"]:
                    yield {
                        "prompt": prompt,
                        "chosen": responses[better],
                        "rejected": responses[worse],
                        "sft_target": entry.get("sft_target"),
                        "split": split,
                    }
        except Exception as error:
            raise DataError(
                f"{name} failed: {type(error).__name__}: {error}",
                where=f"sources.{source}.loader, split {split}",
                fix="return {prompt: {responses: [text, ...], pairs: [(better, worse), ...], "
                "sft_target: text}}",
            ) from None


def load_lines(name: str, source: str) -> Iterator[bytes]:
    """The rows of ``load_rows`` as JSON Lines.

    Raises:
        ConfigError: there is no such function.
        DataError: it fails, or returns what no JSON can hold.
    """
    for row in load_rows(name, source):
        try:
            yield orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError:
            # half a character stays what it is, for the check of the rows to name it
            yield f"{_as_json(name, source, row)}\n".encode()


def _as_json(name: str, source: str, row: Mapping[str, Any]) -> str:
    try:
        return json.dumps(row)
    except TypeError as error:
        raise DataError(
            f"{name} gives a value that is no text: {error}",
            where=f"sources.{source}.loader, split {row.get('split')}",
            fix="return prompt, responses and sft_target as str",
        ) from None


def code_hash(name: str) -> str:
    """``+`` and the sha256 of the file that the function is in: another function, other rows.

    Raises:
        ConfigError: there is no such function.
    """
    file = sys.modules[_function(name).__module__].__file__
    return "" if file is None else f"+{sha256_file(Path(file))}"


def _function(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise ConfigError(
            f"the function {name} cannot be had: {type(error).__name__}: {error}",
            fix=f"write {function_name} into {module_name.replace('.', '/')}.py in this folder or "
            "on PYTHONPATH",
        ) from None
    if not callable(function):
        raise ConfigError(f"{name} is no function", fix="name a function")
    return function
