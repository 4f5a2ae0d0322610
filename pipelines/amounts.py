"""Amounts of CPU and memory as Kubernetes writes them, in the forms that kfp passes on."""

from __future__ import annotations

import re
from decimal import Decimal
from math import ceil
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(m|k|[MGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?")
_POWERS = {"": 0, **{unit: power for power, unit in enumerate("kMGTPE", 1)}}
_CPU_OF_KFP = re.compile(r"([0-9]*[.])?[0-9]+m?")
_MEMORY_OF_KFP = re.compile(r"[0-9]+([MGTPE]|[KMGTPE]i)?")
_LEAST_BYTES = 1024**2
"""Less is a unit that was forgotten: no process runs in it."""
_BINARY = ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki")


def _text(value: Any) -> Any:
    """YAML reads 2, 0.5 and 2000000000 as numbers; a boolean is no amount."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    text = f"{Decimal(repr(value)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _whole(text: str, what: str, examples: str) -> Decimal:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no amount of {what}: write it as in {examples}")
    number, unit = Decimal(match[1]), match[2] or ""
    if unit == "m":
        return number / 1000
    if unit[1:].isdigit():
        return number * Decimal(10 ** int(unit[1:]))
    return number * Decimal(_size(unit))


def _size(unit: str) -> int:
    """What ``k`` or ``Gi`` stands for."""
    power = _POWERS[unit[:1].replace("K", "k")]
    return int((1024 if unit.endswith("i") else 1000) ** power)


def _cpu(text: str) -> str:
    """``text`` where kfp takes it, else the same number of cores as a plain number."""
    cores = _whole(text, "CPU", "2, 0.5 or 500m")
    if text.endswith("i"):
        raise ValueError(f"{text!r} counts bytes, not CPU cores: write for example 2 or 500m")
    return text if _CPU_OF_KFP.fullmatch(text) else f"{cores:f}"


def _memory(text: str) -> str:
    """``text`` where kfp takes it, else as many bytes in the largest unit that divides them."""
    n_bytes = _whole(text, "memory", "16Gi, 1.5Gi or 512Mi")
    if text.endswith("m"):
        raise ValueError(f"{text!r} counts thousandths of a byte: write for example {text[:-1]}Mi")
    if n_bytes < _LEAST_BYTES:
        raise ValueError(f"{text!r} is less than a MiB: write the unit, as in 16Gi or 512Mi")
    if _MEMORY_OF_KFP.fullmatch(text):
        return text
    whole = ceil(n_bytes)
    for unit in _BINARY if "i" in text else ():
        if whole % _size(unit) == 0:
            return f"{whole // _size(unit)}{unit}"
    return str(whole)


def _schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string", "pattern": pattern}, {"type": "number"}]})


Cpu = Annotated[
    str,
    BeforeValidator(_text),
    AfterValidator(_cpu),
    _schema(r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(m|k|[MGTPE]|[eE][0-9]{1,2})?$"),
]
"""Cores: 2, 0.5 or 500m."""
Memory = Annotated[
    str,
    BeforeValidator(_text),
    AfterValidator(_memory),
    _schema(r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(k|[MGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?$"),
]
"""Bytes: 16Gi, 1.5Gi or 2000000000."""


def below(limit: str, request: str) -> bool:
    """Whether a limit is under the request beside it."""
    units = "", ""
    return _whole(limit, *units) < _whole(request, *units)
