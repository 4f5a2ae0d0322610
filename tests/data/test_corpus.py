"""A corpus of broken inputs: each ends in its reasons, or in one message; never in a traceback.

Each case is made here rather than kept as a file, so that one sees what is wrong with it.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from dpo.data import check, unpack
from dpo.errors import DataError
from tests.data.conftest import GOOD, Ingest, good_row
from tests.support.tables import as_bytes

ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
LINE = json.dumps(ROW).encode() + b"\n"
MORE = b"".join(json.dumps(good_row(number)).encode() + b"\n" for number in range(50))
zstd = zstandard.ZstdCompressor().compress


def line(**fields: Any) -> bytes:
    return json.dumps({**ROW, **fields}).encode() + b"\n"


def table(columns: dict[str, list[Any]], how: str = "parquet") -> bytes:
    return as_bytes(pa.table(columns), how)


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("rows.jsonl", LINE)
    return sink.getvalue()


COLUMNS = {name: [text] * 3 for name, text in ROW.items()}
CSV = b"prompt,chosen,rejected\n"

UNREADABLE: dict[str, tuple[str, bytes, str]] = {
    "gzip cut short": ("a.jsonl.gz", gzip.compress(MORE)[:-20], "cannot be read to its end"),
    "gzip cut in its head": ("a.jsonl.gz", gzip.compress(MORE)[:6], "cannot be read to its end"),
    "gzip with a wrong sum": (
        *("a.jsonl.gz", gzip.compress(MORE)[:-8] + b"\0" * 8, "cannot be read to its end"),
    ),
    "gzip, then noise": ("a.jsonl.gz", gzip.compress(LINE) + b"?!", "cannot be read to its end"),
    "gzip in name only": ("a.jsonl.gz", LINE, "not a compressed file although its name says so"),
    "zstd cut short": ("a.jsonl.zst", zstd(MORE)[:-9], "cannot be read to its end"),
    "zstd with noise": (
        *("a.jsonl.zst", zstd(MORE)[:12] + b"\xff" * 40, "cannot be read to its end"),
    ),
    "gzip bomb": ("a.jsonl.gz", gzip.compress(b" " * 2**24), "more than 200 times its size"),
    "zstd bomb": ("a.jsonl.zst", zstd(b" " * 2**24), "more than 200 times its size"),
    "UTF-16 with a mark": ("a.jsonl", LINE.decode().encode("utf-16"), "UTF-16"),
    "UTF-16 big-endian": ("a.jsonl", b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "UTF-16"),
    "UTF-16 without a mark": ("a.csv", CSV.decode().encode("utf-16-le"), "UTF-16"),
    "nothing": ("a.jsonl", b"", "the data set is empty"),
    "white space": ("a.jsonl", b" \n\n\t\n", "the data set is empty"),
    "an empty list": ("a.json", b"[]", "the data set is empty"),
    "an empty gzip": ("a.jsonl.gz", gzip.compress(b""), "the data set is empty"),
    "a CSV header alone": ("a.csv", CSV, "the data set is empty"),
    "a table without rows": (
        *("a.parquet", table({name: [] for name in ROW}), "the data set is empty"),
    ),
    "Parquet cut short": ("a.parquet", table(COLUMNS)[:-30], "cannot be read"),
    "Parquet without its end": ("a.parquet", b"PAR1" + b"\0" * 50, "cannot be read"),
    "Parquet in name only": ("a.parquet", LINE, "not a Parquet file"),
    "Parquet with damaged pages": (
        "a.parquet",
        table(COLUMNS)[:20] + b"\xff" * 200 + table(COLUMNS)[220:],
        "cannot be read",
    ),
    "Arrow cut short": ("a.arrow", table(COLUMNS, "file")[:-40], "cannot be read"),
    "Arrow stream cut short": ("a.arrow", table(COLUMNS, "stream")[:200], "cannot be read"),
    "Arrow in name only": ("a.arrow", LINE, "cannot be read"),
    "a zip archive": ("a.jsonl", zipped(), "zip archive"),
    "a workbook of Excel": ("a.xlsx", zipped(), r"spreadsheet(.|\n)*as CSV in UTF-8"),
    "a workbook of an old Excel": ("a.csv", b"\xd0\xcf\x11\xe0" + b"\0" * 60, "as CSV in UTF-8"),
    "bzip2": ("a.jsonl", bz2.compress(LINE), "bzip2"),
    "xz": ("a.jsonl", lzma.compress(LINE), "this is xz"),
    "a PDF": ("a.json", b"%PDF-1.7\n", "a PDF"),
    "an HTML page": ("a.json", b"<!doctype html><title>404</title>", "an HTML page"),
    "a Git LFS pointer": (
        *("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ),
    "an unknown kind": ("a.xlsx", b"cells", "what kind of file"),
    "a list cut short": ("a.json", b"[" + LINE + b",", "not JSON"),
    "a list with a missing comma": ("a.json", b"[" + LINE + LINE + b"]", r"not JSON.*|line 2"),
    "text after a list": ("a.json", b"[" + LINE + b"]\nthe end", "text after the end"),
    "lists without end": ("a.json", b"[" * 50_000, "nested too deeply"),
    "a list that is not UTF-8": ("a.json", b'["caf\xe9"]', "broken encoding"),
    "a key twice in a list": ("a.json", b'[{"prompt": "a", "prompt": "b"}]', "stands there twice"),
    "NaN in a list": ("a.json", b'[{"prompt": NaN}]', "NaN is not a JSON number"),
    "a CSV with a name twice": ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "twice"),
    "a CSV with an open quote in its header": ("a.csv", b'"prompt,chosen\n', "CSV header"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_one_message(
    case: str, ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "_BOMB_FLOOR_BYTES", 2**20)
    name, data, message = UNREADABLE[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        ingest([], {"path": str(path)})
    assert name in str(caught.value) or "sources.rows" in str(caught.value)
    assert not (tmp_path / "out").exists()


REJECTED: dict[str, tuple[str, bytes, dict[str, int]]] = {
    "a byte-order mark": ("a.jsonl", b"\xef\xbb\xbf" + LINE, {}),
    "line ends of Windows": ("a.jsonl", LINE.replace(b"\n", b"\r\n"), {}),
    "a tab-separated CSV": ("a.csv", b"prompt\tchosen\trejected\nWhy?\tSo.\tNo.\n", {}),
    "line ends of the old Mac": ("a.jsonl", LINE.replace(b"\n", b"\r") * 2, {"unreadable": 1}),
    "NUL as an escape": ("a.jsonl", line(chosen="a\0b"), {"control_character": 1}),
    "NUL bytes at the end": ("a.jsonl", LINE + b"\0" * 512, {"unreadable": 1}),
    "an object for a text": (*("a.jsonl", line(chosen={"text": "So."}), {"wrong_type": 1}),),
    "a list for a text": ("a.jsonl", line(rejected=["No."]), {"wrong_type": 1}),
    "a number for a text": ("a.jsonl", line(prompt=42), {"wrong_type": 1}),
    "a boolean for a text": ("a.jsonl", line(chosen=True), {"wrong_type": 1}),
    "null for a text": ("a.jsonl", line(chosen=None), {"missing_field": 1}),
    "a very long line": ("a.jsonl", LINE + line(chosen="x" * 9 * 2**20), {"unreadable": 1}),
    "a very long line in CSV": (
        "a.csv",
        CSV + b"Why?," + b"x" * 9 * 2**20 + b",No.\nWhy?,So.,No.\n",
        {"unreadable": 1},
    ),
    "a very long line in a CSV's quotes": (
        "a.csv",
        CSV + b'Why?,"So\n' + b"x" * 9 * 2**20 + b'\n",No.\n',
        {"unreadable": 1},
    ),
    "a long line without end": (
        "a.jsonl",
        LINE + b'{"prompt": "' + b"x" * 2**24,
        {"unreadable": 1},
    ),
    "Latin-1 in JSON Lines": (
        *("a.jsonl", LINE + '{"prompt": "café"}\n'.encode("latin-1"), {"unreadable": 1}),
    ),
    "Latin-1 in CSV": ("a.csv", CSV + b"caf\xe9,a,b\nWhy?,So.,No.\n", {"broken_encoding": 1}),
    "a CSV with a stray quote": (*("a.csv", CSV + b'a,"b"c,d\nWhy?,So.,No.\n', {"unreadable": 1}),),
    "a CSV with an open quote": (
        "a.csv",
        CSV + b'Why?,So.,No.\na,"b,c\nd,e,f\n',
        {"unreadable": 1},
    ),
    "a CSV with a short row": ("a.csv", CSV + b"a,b\nWhy?,So.,No.\n", {"unreadable": 1}),
    "a CSV with a long row": ("a.csv", CSV + b"a,b,c,d\n", {"unreadable": 1}),
    "a CSV with an empty cell": ("a.csv", CSV + b"a,,c\n", {"missing_field": 1}),
    "a CSV with NUL": ("a.csv", CSV + b"a\0,b,c\n", {"control_character": 1}),
    "a CSV of other columns": ("a.csv", b"text,label\nhello,1\n", {"unknown_format": 1}),
    "a key twice": (
        *(
            "a.jsonl",
            b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}\n',
        ),
        {"unreadable": 1},
    ),
    "Python's own notation": ("a.jsonl", str(ROW).encode() + b"\n", {"unreadable": 1}),
    "a comma too many": ("a.jsonl", LINE.replace(b"}", b",}"), {"unreadable": 1}),
    "a comment": ("a.jsonl", b"// pairs\n" + LINE, {"unreadable": 1}),
    "keys without quotes": ("a.jsonl", b"{prompt: 'a'}\n", {"unreadable": 1}),
    "NaN": ("a.jsonl", b'{"prompt": NaN}\n', {"unreadable": 1}),
    "half a character": ("a.jsonl", b'{"prompt": "\\ud83d"}\n', {"unreadable": 1}),
    "a lost character": ("a.jsonl", line(chosen="caf\ufffd"), {"broken_encoding": 1}),
    "two objects in a line": ("a.jsonl", LINE.strip() + LINE, {"unreadable": 1}),
    "an object over two lines": (
        "a.jsonl",
        LINE + LINE.replace(b", ", b",\n", 1),
        {"unreadable": 2},
    ),
    "a line cut short": ("a.jsonl", LINE + LINE[:-9], {"unreadable": 1}),
    "no-break spaces": ("a.jsonl", line(chosen="\u00a0 \u2003"), {"empty": 1}),
    "lists for rows": ("a.jsonl", b'["a", "b", "c"]\n["d", "e", "f"]\n', {"wrong_type": 2}),
    "texts for rows": ("a.jsonl", b'"a"\n"b"\n', {"wrong_type": 2}),
    "nulls for rows": ("a.jsonl", b"null\nnull\n", {"wrong_type": 2}),
    "numbers for rows": ("a.jsonl", b"1\n2e400\n", {"wrong_type": 1, "unreadable": 1}),
    "keys in capitals": ("a.jsonl", LINE.replace(b"prompt", b"Prompt"), {}),
    "keys with a space": ("a.jsonl", LINE.replace(b"chosen", b"chosen "), {}),
    "Parquet of another schema": (
        *("a.parquet", table({"text": ["a"], "label": [1]}), {"unknown_format": 1}),
    ),
    "Parquet with numbers": (
        "a.parquet",
        table({**COLUMNS, "chosen": [1, 2, 3]}),
        {"wrong_type": 3},
    ),
    "Parquet with nulls": (
        *("a.parquet", table({**COLUMNS, "chosen": [None, "a", None]}), {"missing_field": 2}),
    ),
    "Parquet with bytes": (
        *("a.parquet", table({**COLUMNS, "chosen": [b"a", b"b", b"\xff"]}), {"wrong_type": 3}),
    ),
    "Parquet named as JSON": ("a.json", table({**COLUMNS, "chosen": ["x", "y", "z"]}), {}),
    "an object without rows": ("a.json", b'{"status": "rate limited"}', {"unknown_format": 1}),
    "a huge number": ("a.jsonl", line(split=10**30), {"wrong_split": 1}),
    "deep nesting": ("a.jsonl", LINE + b'{"prompt": ' + b"[" * 5000 + b"\n", {"unreadable": 1}),
    "a message without role": (
        *("a.jsonl", line(prompt=[{"content": "Why?"}]), {"wrong_type": 1}),
    ),
    "a message of parts": (
        "a.jsonl",
        line(prompt=[{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]),
        {},
    ),
    "a message with an image": (
        "a.jsonl",
        line(prompt=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        {"wrong_type": 1},
    ),
    "a tool's message": (
        *("a.jsonl", line(prompt=[{"role": "tool", "content": "x"}]), {"tool_message": 1}),
    ),
    "a call of a tool": (
        "a.jsonl",
        line(prompt=[{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]),
        {"tool_message": 1},
    ),
    "two answers and a verdict on neither": (
        "a.jsonl",
        b'{"prompt": "p", "response_1": "a", "response_2": "b", "winner": "gpt"}\n',
        {"unknown_verdict": 1},
    ),
    "texts that begin unlike, without a prompt": (
        *("a.jsonl", b'{"chosen": "So.", "rejected": "No."}\n', {"no_common_prompt": 1}),
    ),
    "an answer last in the prompt": (
        "a.jsonl",
        line(prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        {"roles_out_of_order": 1},
    ),
    "an unknown split": ("a.jsonl", line(split="holdout"), {"wrong_split": 1}),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_broken_row_has_its_reason(case: str, ingest: Ingest, tmp_path: Path) -> None:
    name, data, reasons = REJECTED[case]
    (tmp_path / name).write_bytes(data)
    found = ingest([], {"path": str(tmp_path / name)})
    assert Counter(found.reasons) == reasons
    rows = found.report["figures"]["by_source"]["rows"]["rows"]
    assert len(found.pairs) + len(found.quarantine) == rows
    for item in found.quarantine:
        assert item["advice"]
        assert item["line"] >= 1
        assert len(json.dumps(item)) < 10 * 2**20


def test_the_corpus_has_at_least_60_inputs() -> None:
    assert len(UNREADABLE) + len(REJECTED) >= 60


def test_a_hundred_megabytes_on_one_line(tmp_path: Path) -> None:
    """In a process of its own, whose memory is measured."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(MORE + b'{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'", "chosen": "b", "rejected": "c"}\n' + LINE)
    # not getrusage: a child of fork begins with its parent's peak
    code = (
        "import re, sys; from dpo.cli import main; code = main(sys.argv[1:]); "
        "status = open('/proc/self/status').read(); "
        "print(code, int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ingest", "--check", "a.jsonl", "--output", "json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *_, result, last = done.stdout.splitlines()
    found = json.loads(result)
    assert (found["rows"], found["accepted"]) == (52, 51)
    (place,) = found["reasons"]["unreadable"]["places"]
    assert (place["line"], place["advice"]) == (51, "the line is longer than 8 MiB")
    assert last.split()[0] == "1"
    assert int(last.split()[1]) < 400, "MiB of memory"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_real_bomb_is_stopped_early(kind: str, ingest: Ingest, tmp_path: Path) -> None:
    """A gibibyte in less than two megabytes, with the limits as they are."""
    path = tmp_path / f"a.jsonl.{'gz' if kind == 'gzip' else 'zst'}"
    if kind == "gzip":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(2**10):
                file.write(b" " * 2**20)
    else:
        with path.open("wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as packed:
            for _ in range(2**10):
                packed.write(b" " * 2**20)
    assert path.stat().st_size < 6 * 2**20
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        ingest([], {"path": str(path)})


def test_a_folder_that_contains_itself_is_read_once(ingest: Ingest, tmp_path: Path) -> None:
    folder = tmp_path / "loop"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    (folder / "a.jsonl").write_bytes(MORE)
    assert len(ingest([], {"path": str(folder)}).pairs) == 50


def test_one_broken_file_among_good_ones_is_named(ingest: Ingest, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "1.jsonl").write_bytes(MORE)
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(MORE)[:-9])
    with pytest.raises(DataError, match=r"2\.jsonl\.gz"):
        ingest([], {"path": str(folder)})


def test_an_interrupt_leaves_nothing(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "_check_row", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ingest([good_row(1)])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_ingest_looks_not_complete(tmp_path: Path, how: signal.Signals) -> None:
    """Stopped while it checks rows: no output, no traceback, and after all but SIGKILL nothing."""
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD) * 200_000)
    command = ["ingest", "datasets=[good.jsonl]", "model=tiny", "output=out"]
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/spill/*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in errors
    if how != signal.SIGKILL:
        assert list(tmp_path.glob(".out.*")) == []
