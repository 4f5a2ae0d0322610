"""Which rows of a table a parser may read otherwise than as their prompt, chosen and rejected.

The tests of ``prompts``, ``fields`` and ``verdicts`` for whole columns; they may name a row too
many, never one too few.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpo.data.fields import LIST_AS_TEXT, plain_name
from dpo.data.media import MEDIA, TOOLS
from dpo.data.prompts import HISTORY, SYSTEMS
from dpo.data.verdicts import MARK_CHARS, UNACCEPTED, answer_groups

_READ_TOO = frozenset({*SYSTEMS, HISTORY, *MEDIA, TOOLS})
_LIST = re.compile(LIST_AS_TEXT.pattern.encode())
_STARTS = b"[{"
_CHAR_BYTES = 4

Mask = npt.NDArray[np.bool_]


def other_fields(table: pa.Table, texts: tuple[str, ...]) -> Mask:
    """Rows with a value in a field beside the texts that is read as well, or that forbids them."""
    read = _READ_TOO.union(texts)
    found = np.zeros(table.num_rows, dtype=bool)
    for name in table.column_names:
        plain = plain_name(name)
        if name not in texts and plain in read:
            column = table[name]
            holds = pc.is_valid(column)
            if pa.types.is_string(column.type):
                holds = pc.and_kleene(holds, pc.greater(pc.binary_length(column), 0))
            found |= holds.fill_null(False).to_numpy()
        elif plain == "answer" and pa.types.is_string(table[name].type):
            found |= pc.is_in(table[name], pa.array(UNACCEPTED)).to_numpy()
    return found


def names_of_fields(table: pa.Table, texts: tuple[str, ...]) -> Mask:
    """Rows whose chosen and rejected may be names of other fields, or marks of answers in them."""
    found = np.zeros(table.num_rows, dtype=bool)
    names = [name for name in table.column_names if name not in texts]
    pair = [table[name] for name in ("chosen", "rejected") if name in table.column_names]
    if not names or len(pair) < 2:
        return found
    longest = max(len(name.encode()) for name in names)
    has_answers = bool(answer_groups(dict.fromkeys(names, "?")))
    if has_answers:
        longest = max(longest, MARK_CHARS * _CHAR_BYTES)
    short = [pc.less_equal(pc.binary_length(column), longest) for column in pair]
    rows = np.flatnonzero(pc.and_(*short).fill_null(False).to_numpy())
    if has_answers:
        found[rows] = True
    elif len(rows):
        values = pa.array(names)
        named = [pc.is_in(column.take(pa.array(rows)), values) for column in pair]
        found[rows] = pc.and_(*named).to_numpy()
    return found


def lists_as_text(raw: bytes, ends: npt.NDArray[np.int32]) -> list[int]:
    """Numbers of the texts that begin as messages do in JSON or in Python's notation.

    Args:
        raw: The texts in a row.
        ends: The end of each.
    """
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    rows = np.flatnonzero(starts < ends)
    first = np.frombuffer(raw, dtype=np.uint8)[starts[rows]]
    rows = rows[np.isin(first, list(_STARTS))]
    return [row for row in rows.tolist() if _LIST.match(raw, int(starts[row]))]
