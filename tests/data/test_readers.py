"""Readers of files: every row comes with its line, broken ones with their problem."""

import gzip
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo.data import lines, tables, unpack
from dpo.data.json_stream import JsonSyntax, iter_document
from dpo.data.lines import RawRow, piece_rows
from dpo.data.readers import is_lines, line_pieces, rows
from dpo.errors import DataError
from tests.support.tables import as_bytes

ROWS = [{"prompt": f"p{n}", "chosen": 'a\nb,"ü"', "rejected": "c"} for n in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
# without the time, which would make another test's name of it in each process
GZIPPED = gzip.compress(LINES, mtime=0)


def read(path: Path, data: bytes | None = None) -> list[RawRow]:
    if data is not None:
        path.write_bytes(data)
    return list(rows(path, path.name))


def values(found: list[RawRow]) -> list[Any]:
    assert not [row.problem for row in found if row.problem]
    return [row.value for row in found]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def table(form: str, names: list[str]) -> bytes:
    """A table of one row, in Parquet or in Arrow's file or stream format."""
    made = pa.Table.from_arrays([pa.array([name]) for name in names], names=names)
    return as_bytes(made, form)


def csv_bytes() -> bytes:
    cells = [["prompt", "chosen", "rejected"], *[list(row.values()) for row in ROWS]]
    text = "".join(
        ",".join('"' + c.replace('"', '""') + '"' for c in row) + "\r\n" for row in cells
    )
    return text.encode()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES),
        ("rows.ndjson", LINES.rstrip()),
        ("rows.json", LINES),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.json", json.dumps({"communityId": "x", "dataset": ROWS}).encode()),
        ("rows.json", json.dumps({"dataset": ROWS, "communityId": "x"}, indent=1).encode()),
        ("rows.csv", csv_bytes()),
    ],
)
def test_text_containers(tmp_path: Path, name: str, data: bytes, pack: Any) -> None:
    suffix = {bytes: "", gzip.compress: ".gz", zstd: ".zst"}[pack]
    assert values(read(tmp_path / (name + suffix), pack(data))) == ROWS


def test_tables(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    for path in tmp_path.iterdir():
        found = read(path)
        assert values(found) == ROWS
        assert [row.line for row in found] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_large_arrow_file_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Any
) -> None:
    """One batch may be the whole table: polars writes such files."""
    monkeypatch.setattr(tables, "_READ_BYTES", 1000)
    monkeypatch.setattr(tables, "_BATCH_BYTES", 10_000)
    table = pa.table({"prompt": [f"{n:04d}" * 10 for n in range(2500)], "n": range(2500)})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    for name, writer_of in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        path = tmp_path / f"{name}.arrow"
        with writer_of(path, table.schema, options=options) as writer:
            writer.write_table(table)
        assert values(read(path)) == table.to_pylist()
        left = rows(path, name)
        assert next(left).value["n"] == 0
        os.truncate(path, 5000)
        with pytest.raises(DataError, match="changed while it was read"):
            list(left)


def test_json_without_a_suffix_is_known_by_its_bytes(tmp_path: Path) -> None:
    assert values(read(tmp_path / "rows", LINES)) == ROWS
    assert values(read(tmp_path / "part-0.txt", json.dumps(ROWS, indent=1).encode())) == ROWS


def test_a_parquet_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.json")
    assert values(read(tmp_path / "rows.json")) == ROWS


def test_lines_are_counted_with_blank_and_broken_ones(tmp_path: Path) -> None:
    data = b'{"a": 1}\n\n{"a": \n  \n{"a": 2}'
    found = read(tmp_path / "x.jsonl", data)
    assert [(row.line, bool(row.problem)) for row in found] == [(1, False), (3, True), (5, False)]
    assert found[1].value == '{"a": '
    assert "not JSON" in found[1].problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "\xff"}', "broken encoding: byte 0xff at position 8 is not UTF-8"),
        (b'{"a": 1}\0', "holds NUL bytes"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b'{"a": NaN}', "not JSON: NaN is not a JSON number, write null (column 7)"),
        (b'{"a": [1, -Infinity]}', "Infinity is not a JSON number"),
        (b'{"a": 1, "b": 0, "a": 2}', "the key 'a' stands there twice"),
        (b'{"a": [{"role": "user", "b": 1, "b": 2}]}', "the key 'b' stands there twice"),
        (b"[" * 3000, "not JSON"),
        (b'{"a": "x', "not JSON"),
    ],
)
def test_a_broken_line_costs_itself_alone(tmp_path: Path, line: bytes, problem: str) -> None:
    found = read(tmp_path / "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert [row.line for row in found] == [1, 2, 3]
    assert problem in found[1].problem
    assert found[0].value == {"a": 1}
    assert found[2].value == {"a": 3}


def test_a_row_that_cannot_be_read_is_kept_whole(tmp_path: Path) -> None:
    """And as text: the parser would keep the last of two equal keys."""
    broken = ['{"a": "' + "ü" * 9000 + '"', '{"a": 1, "a": 2}']
    found = read(tmp_path / "x.jsonl", "\n".join(broken).encode())
    assert [row.value for row in found] == broken
    text = f'p,"{"c" * 9000}" d,r'
    found = read(tmp_path / "x.csv", f"prompt,chosen,rejected\n{text}\np,c\n".encode())
    columns = ["prompt", "chosen", "rejected"]
    assert [row.value for row in found] == [text + "\n", {"columns": columns, "fields": ["p", "c"]}]


@pytest.mark.parametrize("name", ["pairs", "rows", "data", "dataset"])
def test_rows_with_a_list_of_such_a_name_are_rows(tmp_path: Path, name: str) -> None:
    """A document of one line holds nothing after it."""
    row = {name: [{"prompt": "p"}], "instruction": "q"}
    line = json.dumps(row).encode() + b"\n"
    assert values(read(tmp_path / "rows.json", line + b"\n" + line)) == [row, row]
    assert values(read(tmp_path / "rows.json", line)) == [{"prompt": "p"}]


def test_a_very_long_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 2**20)
    long = b'{"a": "' + b"x" * (5 * 2**20) + b'"}\n'
    found = read(tmp_path / "x.jsonl", b'{"a": 1}\n' + long + b'{"a": 3}\n' + long.rstrip())
    assert [row.line for row in found] == [1, 2, 3, 4]
    assert "longer than 1 MiB" in found[1].problem
    assert len(found[1].value) == 4000 + len(lines.CUT)
    assert "longer than 1 MiB" in found[3].problem


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", "ab\n".encode("utf-16"), "UTF-16"),
        ("x.jsonl", "ab\n".encode("utf-16-le"), "UTF-16"),
        ("x.jsonl", b"PK\x03\x04rest", "zip archive"),
        ("x.json", b"<!DOCTYPE html><html>", "HTML page"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("x.arrow", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("x.csv.gz", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ("x.jsonl.gz", LINES, "not a compressed file although its name says so"),
        ("x.jsonl.gz", GZIPPED[:-9], "cannot be read to its end"),
        ("x.jsonl.gz", GZIPPED[:40], "cannot be read to its end"),
        ("x.jsonl.gz", GZIPPED + b"garbage", "cannot be read to its end"),
        ("x.jsonl.zst", zstd(LINES)[:-5], "cannot be read to its end"),
        ("x.parquet", b"PAR1 and then nothing", "the table in this file cannot be read"),
        ("x.parquet", b"something else", "not a Parquet file, although its name says so"),
        ("x.arrow", b"something else", "the table in this file cannot be read"),
        ("x.txt", b"words", "cannot tell what kind of file this is"),
        ("x.json", b'[{"a": 1}, {"a": ]', "not JSON"),
        ("x.json", b'[{"a": 1}', "not JSON"),
        ("x.json", b"[1] [2]", "text after the end"),
        ("x.json", b'["\xff"]', "broken encoding"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'{\n"a": 1,\n"b": 2,\n"a": 3\n}', "the key 'a' stands there twice"),
        ("x.csv", b"a,b,a\n1,2,3\n", "names 'a' twice"),
        ("x.parquet", table("parquet", ["a", "b", "a"]), "two columns named 'a'"),
        ("x.arrow", table("file", ["a", "b", "a"]), "two columns named 'a'"),
        ("x.arrow", table("stream", ["a", "b", "a"]), "two columns named 'a'"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_message(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, data)
    assert name in str(caught.value)


def test_what_looks_like_a_key_in_a_text_is_none(tmp_path: Path) -> None:
    row = {"a": [{"b": 'say {"b": 1, "b": 2}'}, {"b": '"b":'}], '"c"': "x\\"}
    assert read(tmp_path / "x.jsonl", json.dumps(row).encode())[0].value == row


def test_missing_and_forbidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read(tmp_path / "none.jsonl")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "x.jsonl"
    path.write_bytes(LINES)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="no permission to read"):
        read(path)


def test_json_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.json, line 4"):
        read(tmp_path / "x.json", b'[\n{"a": 1},\n\n{"a" 2}\n]')


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Any) -> None:
    monkeypatch.setattr(unpack, "_BOMB_FLOOR_BYTES", 2**20)
    with pytest.raises(DataError, match="more than 200 times its size"):
        read(tmp_path / "x.jsonl.gz", pack(b" " * 2**25))


def test_several_gzip_members_and_zstd_frames(tmp_path: Path) -> None:
    first, second = LINES[:100], LINES[100:]
    data = gzip.compress(first) + b"\0" * 10 + gzip.compress(second) + b"\0" * 3
    assert values(read(tmp_path / "a.jsonl.gz", data)) == ROWS
    assert values(read(tmp_path / "b.jsonl.zst", zstd(first) + zstd(second))) == ROWS


def test_csv_stray_quote_and_wrong_width(tmp_path: Path) -> None:
    data = b'a,b\n1,2\n"3"x,4\n5,6\n7,8,9\n10,\n'
    found = read(tmp_path / "x.csv", data)
    assert [row.line for row in found] == [2, 3, 4, 5, 6]
    assert "CSV" in found[1].problem
    assert "3 fields where the header has 2" in found[3].problem
    assert found[4].value == {"a": "10", "b": None}


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_row_of_a_table_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dictionary: bool
) -> None:
    """Of texts in lists and of those that a dictionary holds, too."""
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 10_000)
    large = {"prompt": "p", "chosen": ["x" * 9000, "y" * 2000]}
    values = [{"prompt": f"{n}" * 900, "chosen": ["c"]} for n in range(9)]
    table = pa.Table.from_pylist([*values[:5], large, *values[5:]])
    if dictionary:
        table = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    if name == "x.arrow":
        path = str(tmp_path / name)
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, tmp_path / name)
    found = read(tmp_path / name)
    assert [row.line for row in found] == list(range(1, 11))
    assert [row.value for row in found if not row.problem] == values
    assert found[5].problem.startswith("the row is larger than")
    assert found[5].value.startswith("prompt: p\nchosen: ['xxx")
    assert found[5].value.endswith(lines.CUT)


def test_a_text_of_a_table_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    """Arrow takes any bytes as text."""
    data = pa.array([b"one", b"t\xfcwo", b"three"])
    texts = pa.StringArray.from_buffers(3, *data.buffers()[1:])
    pq.write_table(pa.table({"prompt": texts, "n": [1, 2, 3]}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert [row.value["n"] for row in found] == [1, 2, 3]
    assert [bool(row.problem) for row in found] == [False, True, False]
    assert "byte 0xfc at position 2 is not UTF-8" in found[1].problem
    assert found[1].value["prompt"] == "t\N{REPLACEMENT CHARACTER}wo"


def test_large_rows_of_a_table_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_BATCH_BYTES", 2**16)
    texts = [f"{n:05d}" * 2000 for n in range(50)] + [f"{n}" for n in range(50)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": texts}), path, row_group_size=25, compression="none")
    with pq.ParquetFile(path) as file:
        sizes = [batch.num_rows for batch in tables._parquet_batches(file)]
    assert max(sizes[:-2]) <= 6
    assert sizes[-2:] == [25, 25] or sizes[-1] == 50
    assert [row.value["prompt"] for row in read(path)] == texts


def test_csv_with_an_open_quote_names_the_lines_that_it_swallowed(tmp_path: Path) -> None:
    found = read(tmp_path / "x.csv", b'a,b\n"1,2\n3,4\n5,6\n')
    assert len(found) == 1
    assert "lines 2 to 4" in found[0].problem


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_csv_delimiters(tmp_path: Path, delimiter: str) -> None:
    data = f"a{delimiter}b\n1{delimiter}2,5\n".encode()
    assert values(read(tmp_path / "x.csv", data)) == [{"a": "1", "b": "2,5"}]


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "sep=;\r"])
def test_csv_of_excel_may_tell_its_delimiter(tmp_path: Path, first: str) -> None:
    found = read(tmp_path / "x.csv", f"{first}\na,b;c\n1;2\n\n3;4;5\n".encode())
    assert [(row.line, row.value) for row in found[:1]] == [(3, {"a,b": "1", "c": "2"})]
    assert [(row.line, bool(row.problem)) for row in found] == [(3, False), (5, True)]


def test_which_files_can_be_read_in_blocks(tmp_path: Path) -> None:
    for name, data, plain in (
        ("a.jsonl", LINES, True),
        ("b.json", LINES, True),
        ("c.json", json.dumps(ROWS).encode(), False),
        ("d.jsonl.gz", GZIPPED, False),
        ("e.csv", csv_bytes(), False),
    ):
        (tmp_path / name).write_bytes(data)
        assert is_lines(tmp_path / name, name, plain=True) is plain


def test_a_block_holds_its_own_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    middle = LINES.index(b"\n", len(LINES) // 2) + 1
    halves = [
        [
            row.value
            for piece in line_pieces(tmp_path / "a.jsonl", "a", start, end)
            for row in piece_rows(piece, "a")
        ]
        for start, end in ((0, middle), (middle, len(LINES)))
    ]
    assert halves[0] + halves[1] == ROWS
    assert min(map(len, halves)) > 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@given(st.lists(json_values, max_size=6), st.integers(1, 7), st.none() | st.integers(0, 2))
@settings(deadline=None)
def test_the_json_stream_reads_what_json_wrote(
    items: list[Any], size: int, indent: int | None
) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=False).encode()
    assert [value for _, value in iter_document(pieces(data, size))] == items


@given(st.lists(json_values, min_size=1, max_size=3), st.integers(1, 7), st.data())
@settings(deadline=None)
def test_a_cut_off_json_list_never_passes(items: list[Any], size: int, data: Any) -> None:
    text = json.dumps(items).encode()
    cut = data.draw(st.integers(1, len(text) - 1))
    with pytest.raises(JsonSyntax):
        list(iter_document(pieces(text[:cut], size)))


@given(st.binary(max_size=300), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.arrow"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_end_in_rows_or_in_one_message(tmp_path: Path, data: bytes, name: str) -> None:
    with suppress(DataError):
        found = read(tmp_path / name, data)
        assert all(row.problem or row.value is not None or name == "x.json" for row in found)


@given(st.binary(min_size=1, max_size=60), st.integers(0, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_gzip_never_passes_for_whole(tmp_path: Path, noise: bytes, place: int) -> None:
    packed = gzip.compress(LINES * 3, mtime=0)
    place %= len(packed) - len(noise)
    damaged = packed[:place] + noise + packed[place + len(noise) :]
    try:
        whole = zlib.decompress(damaged, wbits=31) == LINES * 3
    except zlib.error:
        whole = False
    try:
        found = read(tmp_path / "x.jsonl.gz", damaged)
    except DataError:
        assert not whole
    else:
        assert whole
        assert values(found) == ROWS * 3
