"""Set times as Kubeflow reads them: six fields, seconds first (robfig/cron, its first version).

Its API server refuses what it cannot read. What it can read and what never comes, such as 31
February, it takes, and no run is ever started.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dpo.errors import ConfigError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST = dict(zip(range(1, 13), (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))


class _Field(NamedTuple):
    name: str
    least: int
    most: int
    words: tuple[str, ...] = ()


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 6, _DAYS),
)


def check_cron(cron: str) -> None:
    """Refuse set times that Kubeflow would refuse, or that never come.

    Args:
        cron: Second, minute, hour, day of the month, month, day of the week; or ``@daily``,
            ``@every 6h`` and their like, which are left to Kubeflow.

    Raises:
        ConfigError: says which field it is.
    """
    if cron.startswith("@"):
        return
    words = cron.split()
    if len(words) != len(_FIELDS):
        raise _wrong(f"the schedule {cron!r} has {len(words)} fields")
    values = [_values(word, field, cron) for word, field in zip(words, _FIELDS, strict=True)]
    days, months = values[3], values[4]
    # a day of the week besides comes in every month
    if words[5][0] in "*?" and min(days) > max(_LONGEST[month] for month in months):
        raise _wrong(f"the schedule {cron!r} names a day that never comes: no run would be started")


def _values(word: str, field: _Field, cron: str) -> set[int]:
    try:
        return {value for part in word.split(",") for value in _part(part, field)}
    except ValueError:
        raise _wrong(
            f"{word!r} in the schedule {cron!r} is no {field.name} ({field.least} to {field.most})"
        ) from None


def _part(part: str, field: _Field) -> Iterator[int]:
    """``*``, ``5``, ``1-5`` or ``mon-fri``, each with a step behind ``/`` or without."""
    span, slash, text = part.lower().partition("/")
    step = int(text) if slash else 1
    low, dash, high = span.partition("-")
    if span in ("*", "?"):
        first, last = field.least, field.most
    else:
        first = _number(low, field)
        # 5/10 is 5-59/10
        last = _number(high, field) if dash else field.most if slash else first
    if not (field.least <= first <= last <= field.most and step > 0):
        raise ValueError(part)
    yield from range(first, last + 1, step)


def _number(text: str, field: _Field) -> int:
    if text in field.words:
        return field.least + field.words.index(text)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)


def _wrong(found: str) -> ConfigError:
    return ConfigError(
        found,
        where="--schedule",
        fix='give six fields, seconds first: "0 0 3 * * *" is every night at three, '
        '"0 30 6 * * MON-FRI" half past six on workdays',
    )
