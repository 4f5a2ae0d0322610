"""Many plain pairs at once: whole columns are parsed, checked and hashed with Arrow and numpy.

Every test here asks whether a row might be at fault, and none decides that it is. Rows that a test
flags, and pieces of a file that do not fit, go one by one through parser and ``Validator``, which
alone know reasons. So each row becomes what they would have made of it; a test compares the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from dpo.data import repeats, suspects
from dpo.data.alike import alike_rows
from dpo.data.buffers import buffer_of
from dpo.data.fields import plain_name
from dpo.data.formats import ASSISTANT
from dpo.data.lines import Piece, newlines
from dpo.data.schema import SPLIT_WORDS, TEST, TRAIN
from dpo.data.spill import SPILL_SCHEMA
from dpo.data.text_columns import Cleanness, Mask, cut_to_blank, empty_turns, mask_of
from dpo.data.validate import TURN_MARKS, Validator

_TEXTS = ("prompt", "chosen", "rejected", "sft_target", "split")
_MESSAGE_LISTS = {"messages", "conversations", "conversation"}
_MAX_FLAGGED_SHARE = 0.1
_ID_BYTES = 16
_SCALARS: Mapping[type, pa.DataType] = {
    str: pa.string(),
    int: pa.float64(),
    float: pa.float64(),
    bool: pa.bool_(),
    type(None): pa.string(),
}
_WORD_CODES = np.array([SPLIT_WORDS[word] == TEST for word in SPLIT_WORDS] + [False])


class Sound(NamedTuple):
    """The rows of a piece, most of which are sound without doubt."""

    flagged: list[int]
    """Numbers of the rows that need a closer look, from 0; what ``batch`` has there is no pair."""
    batch: pa.RecordBatch
    """The pairs: ``spill.SPILL_SCHEMA``."""
    keys: repeats.Records


class _Texts(NamedTuple):
    """Columns of one length."""

    prompt: pa.Array
    chosen: pa.Array
    rejected: pa.Array
    target: pa.Array
    split: pa.Array


@dataclass
class Columns:
    """Reads the pieces of one block."""

    format_name: str
    """Of the source."""
    validator: Validator
    file_split: str | None
    """What the file's name states."""

    @classmethod
    def for_source(
        cls, format_name: str, validator: Validator, file_split: str | None
    ) -> Columns | None:
        """None where each row needs a look of its own."""
        known = format_name in ("auto", "pairs", "novalto", "hh")
        if known and validator.prompt_format == "raw" and validator.answer_bytes > 0:
            return cls(format_name, validator, file_split)
        return None

    def of_lines(self, piece: Piece) -> Sound | None:
        """The sound rows of some lines; None when a line may be no plain object of texts."""
        found = None if piece.too_long else _parsed(piece)
        if found is None:
            return None
        table, named = found
        numbers = np.arange(piece.first, piece.first + table.num_rows)
        return self.of_table(table, numbers, prompt_named=named)

    def of_table(
        self, table: pa.Table, lines: npt.NDArray[np.int64], *, prompt_named: bool
    ) -> Sound | None:
        """The sound rows of a table.

        Args:
            table: Columns of texts, with others beside them.
            lines: Line of each row.
            prompt_named: Whether rows have a key ``prompt``, were it null.
        """
        form = self._form(set(table.column_names) - set(_TEXTS), prompt_named)
        if form is None:
            return None
        texts = _Texts(*(_column(table, name) for name in _TEXTS))
        sound = _all(pc.is_valid(texts.chosen), pc.is_valid(texts.rejected))
        if form == "hh":
            texts, fits = _dialogues(texts)
        else:
            fits = mask_of(pc.is_valid(texts.prompt))
        sound &= fits & self._sound_texts(texts)
        sound &= ~(suspects.other_fields(table, _TEXTS) | suspects.names_of_fields(table, _TEXTS))
        flagged = np.flatnonzero(~sound).tolist()
        if len(flagged) > _MAX_FLAGGED_SHARE * len(sound):
            return None
        return Sound(flagged, *self._pairs(texts, lines))

    def _form(self, others: set[str], prompt_named: bool) -> str | None:
        """``hh`` or ``pairs``, as ``registry`` would say; None where it may say something else."""
        if "reason" in others:
            return None
        if self.format_name != "auto":
            return "hh" if self.format_name == "hh" else "pairs"
        if _MESSAGE_LISTS.intersection(map(plain_name, others)):
            return None
        if prompt_named:
            return "pairs"
        return None if others else "hh"

    def _sound_texts(self, texts: _Texts) -> Mask:
        """Rows of which no single test says that something may be wrong."""
        prompt, chosen, rejected, target, split = texts
        sound = np.ones(len(chosen), dtype=bool)
        for column in (prompt, chosen, rejected, target):
            if column.null_count < len(column):
                cleanness = self._of_prompts if column is prompt else self._of_answers
                sound &= cleanness.of(column)
        sound[empty_turns(prompt)] = False
        limits = self.validator.limits
        at_end = limits.truncation_mode == "keep_end"
        sound[cut_to_blank(prompt, limits.max_prompt_length, at_end=at_end)] = False
        for column in (chosen, rejected):
            sound[cut_to_blank(column, self.validator.answer_bytes, at_end=False)] = False
        sound[alike_rows(*map(pc.utf8_trim_whitespace, (chosen, rejected)))] = False
        starts = [
            pc.binary_slice(text.cast(pa.binary()), 0, self.validator.answer_bytes)
            for text in (chosen, rejected)
        ]
        sound &= ~mask_of(pc.equal(*starts))
        if (limit := self.validator.max_prompt_tokens) is not None:
            sound &= mask_of(pc.less_equal(pc.binary_length(prompt), limit))
        if split.null_count < len(split):
            sound &= _all(pc.or_(pc.is_null(split), pc.is_in(split, _words())))
        return sound

    @cached_property
    def _of_prompts(self) -> Cleanness:
        return Cleanness(self.validator.reserved)

    @cached_property
    def _of_answers(self) -> Cleanness:
        # marks of turns, which only prompts may have; in a whole dialogue they tell what it is
        return Cleanness([*self.validator.reserved, *TURN_MARKS])

    def _pairs(
        self, texts: _Texts, lines: npt.NDArray[np.int64]
    ) -> tuple[pa.RecordBatch, repeats.Records]:
        prompt, chosen, rejected, target, split = texts
        # the nulls of rows that are flagged
        filled = [column.fill_null("") for column in (prompt, chosen, rejected)]
        # bytes, for these are made much faster than texts
        lists = [column.cast(pa.binary()).to_pylist() for column in filled]
        digests, near = _prompt_hashes(lists[0])
        in_test = self._in_test(split, digests)
        columns = [
            *(prompt, chosen, rejected),
            target,
            pa.repeat(self.validator.dataset, len(prompt)),
            _strings(TRAIN, TEST).take(pa.array(in_test.astype(np.int8))),
            _pair_ids(filled),
            pa.nulls(len(prompt), SPILL_SCHEMA.field("prompt_messages").type),
            pa.array(lines),
        ]
        batch = pa.record_batch(columns, schema=SPILL_SCHEMA)
        keys = np.empty(len(prompt), dtype=repeats.KEY)
        keys["prompt_a"], keys["prompt_b"] = digests[:, 1], digests[:, 2]
        keys["chosen"], keys["rejected"] = map(repeats.text_hashes, lists[1:])
        keys["near"], keys["test"] = near, in_test
        keys["source"], keys["limit"] = self.validator.mark.source, self.validator.mark.limit
        return batch, keys

    def _in_test(self, split: pa.Array, digests: npt.NDArray[np.uint64]) -> Mask:
        """As ``Validator`` chooses: forced, the row's own, the file's, or by hash."""
        mode = self.validator.split
        if mode in (TRAIN, TEST):
            return np.full(len(digests), mode == TEST)
        # the first 8 bytes as a big-endian number, as ``schema.split_of`` has it
        shares = digests[:, 0].byteswap() / 2.0**64
        in_test = shares < self.validator.test_fraction
        if mode == "hash":
            return np.asarray(in_test)
        if self.file_split is not None:
            in_test = np.full(len(digests), self.file_split == TEST)
        if split.null_count < len(split):
            codes = pc.index_in(split, _words()).fill_null(len(SPLIT_WORDS)).to_numpy()
            in_test = np.where(codes < len(SPLIT_WORDS), _WORD_CODES[codes], in_test)
        return np.asarray(in_test)


def _prompt_hashes(
    prompts: Sequence[bytes],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """(four little-endian words of each prompt's digest, its ``near_hash``)."""
    sha256 = hashlib.sha256
    digests = b"".join([sha256(b"split\0" + text).digest() for text in prompts])
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 4), repeats.near_hashes(prompts)


def _pair_ids(texts: Sequence[pa.Array]) -> pa.Array:
    """``schema.pair_id`` of each row; the hexadecimal digits of all are made at once."""
    sha256, n_rows = hashlib.sha256, len(texts[0])
    digests = b"".join([sha256(row).digest() for row in _json_lists(texts)])
    ids = np.frombuffer(digests, dtype=np.uint8).reshape(n_rows, -1)[:, :_ID_BYTES]
    digits = ids.tobytes().hex().encode()
    ends = np.arange(n_rows + 1, dtype=np.int32) * (2 * _ID_BYTES)
    return pa.Array.from_buffers(
        pa.string(), n_rows, [None, pa.py_buffer(ends), pa.py_buffer(digits)]
    )


_BETWEEN, _AFTER = "\x01", "\x02"
"""Stand for what JSON has between and after the texts of a list; no sound text has them."""
_ESCAPES = ((b"\\", rb"\\"), (b'"', rb"\""), (b"\n", rb"\n"), (b"\r", rb"\r"), (b"\t", rb"\t"))


def _json_lists(texts: Sequence[pa.Array]) -> Iterable[bytes | memoryview]:
    """The texts of each row as orjson writes a list of them; anything for texts with controls.

    All rows at once: to make a list, a tuple and a JSON text of each took twice the time.
    """
    joined = pc.binary_join_element_wise(*texts, _BETWEEN)
    raw, _ = buffer_of(pc.binary_join_element_wise(joined, "", _AFTER))
    for char, escaped in _ESCAPES:
        raw = raw.replace(char, escaped)
    after = _AFTER.encode()
    raw = raw.replace(_BETWEEN.encode(), b'","').replace(after, b'"]' + after + b'["')
    raw = b'["' + raw
    ends = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == ord(after)).tolist()
    if len(ends) != len(texts[0]):
        # a text that is flagged has such a character
        return map(orjson.dumps, zip(*(text.to_pylist() for text in texts), strict=True))
    view = memoryview(raw)
    starts = [0, *(end + 1 for end in ends)]
    return [view[start:end] for start, end in zip(starts, ends, strict=False)]


def _parsed(piece: Piece) -> tuple[pa.Table, bool] | None:
    """Lines as a table of scalars, one row a line, and whether any row may have a key ``prompt``.

    None where they may be anything else.
    """
    data, ends = piece.data, piece.newlines
    if b"\r" in data or not data.endswith(b"\n"):
        data = data.replace(b"\r\n", b"\n").removesuffix(b"\n") + b"\n"
        ends = newlines(data)
    fields = _fields(data, ends)
    if fields is None or not _object_a_line(data, ends):
        return None
    table = _read(data, ends, pa.schema(fields.items()))
    if table is not None:
        # other rows have no other fields
        return table, "prompt" in fields
    table = _read(data, ends, pa.schema((dict.fromkeys(_TEXTS, pa.string()) | fields).items()))
    return None if table is None else (table, b'"prompt"' in data)


def _read(data: bytes, ends: npt.NDArray[np.int64], schema: pa.Schema) -> pa.Table | None:
    """The table of some lines; None where they do not fit the schema.

    Unexpected fields and nested values are errors: Arrow's parser builds a type as deep as the
    value and runs out of stack (seen with pyarrow 26).
    """
    try:
        # by itself the parser takes any bytes for text; Arrow's check is 15 times Python's in speed
        pa.Array.from_buffers(
            pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, len(data)])), pa.py_buffer(data)]
        ).view(pa.large_string()).validate(full=True)
        table = pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="error"
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        # not ArrowCancelled, which stands for Ctrl-C
        return None
    return table if table.num_rows == len(ends) else None


def _object_a_line(data: bytes, ends: npt.NDArray[np.int64]) -> bool:
    """Whether each line end stands between ``}`` and ``{``.

    No JSON value has that inside, so with as many values as lines each line is one object.
    """
    codes = np.frombuffer(data, dtype=np.uint8)
    return (
        data[:1] == b"{"
        and bool((codes[ends - 1] == ord("}")).all())
        and bool((codes[ends[:-1] + 1] == ord("{")).all())
    )


def _fields(data: bytes, ends: npt.NDArray[np.int64]) -> dict[str, pa.DataType] | None:
    """Fields of a first, a middle and a last line, with their types.

    None where a value is neither text nor number.
    """
    fields: dict[str, pa.DataType] = {}
    for number in {0, len(ends) // 2, len(ends) - 1}:
        start = int(ends[number - 1]) + 1 if number else 0
        try:
            row = orjson.loads(data[start : int(ends[number])])
        except orjson.JSONDecodeError:
            return None
        if not isinstance(row, dict):
            return None
        for key, value in row.items():
            if key in _TEXTS:
                fields[key] = pa.string()
            elif type(value) not in _SCALARS:
                return None
            elif value is not None or key not in fields:
                fields[key] = _SCALARS[type(value)]
    if pa.float64() in fields.values() and (b"NaN" in data or b"Inf" in data):
        # numbers to Arrow, an error in JSON
        return None
    return fields


@cache
def _strings(*texts: str) -> pa.Array:
    # not when the module is imported: it makes Arrow import pandas
    return pa.array(texts)


def _words() -> pa.Array:
    return _strings(*SPLIT_WORDS)


def _column(table: pa.Table, name: str) -> pa.Array:
    """A column of texts in one piece; nulls where the table has none."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    column = table[name]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _dialogues(texts: _Texts) -> tuple[_Texts, Mask]:
    """hh dialogues divided as ``formats.hh`` does, and which rows can be."""
    fits = np.ones(len(texts.chosen), dtype=bool)
    halves = []
    for text in (texts.chosen, texts.rejected):
        parts = _halved(text)
        two = pc.equal(pc.list_value_length(parts), 2).fill_null(False)
        if pc.sum(two).as_py() < len(two):
            fits &= mask_of(two)
            parts = _halved(pc.if_else(two, text, ASSISTANT))
        halves.append((pc.list_element(parts, 0), pc.list_element(parts, 1)))
    # it may repeat the prompt
    fits &= ~mask_of(pc.is_valid(texts.target))
    (start, chosen), (other_start, rejected) = halves
    fits &= mask_of(pc.equal(start, other_start))
    prompt = pc.binary_join_element_wise(start, ASSISTANT, "")
    return _Texts(prompt, chosen, rejected, pa.nulls(len(prompt), pa.string()), texts.split), fits


def _halved(text: pa.Array) -> pa.Array:
    return pc.split_pattern(text, ASSISTANT, max_splits=1, reverse=True)


def _all(*values: Any) -> Mask:
    together = np.ones(len(values[0]), dtype=bool)
    for value in values:
        together &= mask_of(value)
    return together
