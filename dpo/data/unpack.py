"""The bytes of a text file: unpacked from gzip or zstd, bounded; other kinds are refused."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa
import zstandard

from dpo.errors import DataError

COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
CHUNK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BOMB_FLOOR_BYTES = 256 * 2**20
_BOMB_RATIO = 200
_ZSTD_WINDOW_BYTES = 2**27
_ZSTD_BITE_BYTES = 4096
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF16 = ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
_FOREIGN = {
    b"PK\x03\x04": (
        "a zip archive or a spreadsheet",
        "unpack an archive and name the files in it; save a spreadsheet as CSV in UTF-8",
    ),
    b"\xd0\xcf\x11\xe0": ("a document of an old Office", "save a spreadsheet as CSV in UTF-8"),
    b"BZh": ("bzip2", "unpack it with bunzip2, or pack it with gzip or zstd"),
    b"\xfd7zXZ": ("xz", "unpack it with unxz, or pack it with gzip or zstd"),
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"%PDF": ("a PDF", "name a file of preference pairs"),
    b"<!DO": ("an HTML page", "download the data itself, not the page that shows it"),
    b"<htm": ("an HTML page", "download the data itself, not the page that shows it"),
    b"version https://git-lfs": (
        "a Git LFS pointer",
        "run `git lfs pull` to get the data behind it",
    ),
}


class Text:
    """The unpacked bytes of a text file, in chunks, without a byte-order mark.

    Raises:
        DataError: the bytes are something else than UTF-8 text.
    """

    def __init__(self, path: Path, shown: str, raw: IO[bytes]) -> None:
        self._chunks = _unpacked(path, shown, raw)
        self.head = self._first_megabyte().removeprefix(BYTE_ORDER_MARK)
        """Up to the first megabyte."""
        refuse_foreign(self.head, shown)

    def _first_megabyte(self) -> bytes:
        head = b""
        while len(head) < CHUNK_BYTES and (chunk := next(self._chunks, None)) is not None:
            head += chunk
        return head

    def __iter__(self) -> Iterator[bytes]:
        yield self.head
        yield from self._chunks


def _unpacked(path: Path, shown: str, raw: IO[bytes]) -> Iterator[bytes]:
    first = raw.read(CHUNK_BYTES)
    if first.startswith(GZIP_MAGIC):
        yield from _bounded(path, shown, _gunzip(_then(first, raw)))
    elif first.startswith(ZSTD_MAGIC):
        yield from _bounded(path, shown, _unzstd(_then(first, raw)))
    else:
        if path.name.lower().endswith(COMPRESSED):
            raise DataError(
                "not a compressed file although its name says so",
                where=shown,
                fix="download it again, or rename it",
            )
        yield from _then(first, raw)


def _then(first: bytes, raw: IO[bytes]) -> Iterator[bytes]:
    chunk = first
    while chunk:
        yield chunk
        chunk = raw.read(CHUNK_BYTES)


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """All members of a gzip file, in pieces of at most a megabyte."""
    inflate = None
    for chunk in chunks:
        while chunk:
            # zeros may fill the space between members
            chunk = chunk if inflate else chunk.lstrip(b"\0")
            if not chunk:
                break
            inflate = inflate or zlib.decompressobj(wbits=31)
            yield inflate.decompress(chunk, CHUNK_BYTES)
            if inflate.eof:
                chunk, inflate = inflate.unused_data, None
            else:
                chunk = inflate.unconsumed_tail
    if inflate:
        yield inflate.flush()
        if not inflate.eof:
            raise EOFError("the gzip data ends before its end mark")


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """All frames of a zstd file. Small bites, because one byte may unpack to 32 KiB."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    frame = None
    for chunk in chunks:
        for start in range(0, len(chunk), _ZSTD_BITE_BYTES):
            bite = chunk[start : start + _ZSTD_BITE_BYTES]
            while bite:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(bite)
                bite = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame:
        raise EOFError("the zstd data ends before its end mark")


def _bounded(path: Path, shown: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Stop a file that unpacks to far more than text ever does."""
    limit = max(_BOMB_FLOOR_BYTES, _BOMB_RATIO * path.stat().st_size)
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > limit:
            raise DataError(
                f"the file unpacks to more than {_BOMB_RATIO} times its size: stopped after "
                f"{total // 2**20} MiB",
                where=shown,
                fix="if its text is really that repetitive, unpack it first and name that file",
            )
        yield chunk


@contextmanager
def named_errors(shown: str) -> Iterator[None]:
    """Errors of the system and of libraries as one message that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError("there is no such file", where=shown, fix="check the path") from None
    except PermissionError:
        raise DataError(
            "no permission to read the file", where=shown, fix="change its permissions"
        ) from None
    except pa.ArrowCancelled:
        raise KeyboardInterrupt from None
    except pa.ArrowException as error:
        raise DataError(
            f"the table in this file cannot be read: {_first_line(error)}",
            where=shown,
            fix="it is damaged or was cut short: fetch it again",
        ) from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"the file cannot be read to its end: {_first_line(error)}",
            where=shown,
            fix="it is damaged or was cut short: fetch it again",
        ) from None


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0] if text else type(error).__name__


def refuse_foreign(head: bytes, shown: str) -> None:
    """Refuse a file of another kind.

    Raises:
        DataError: its first bytes are those of an archive, a document or text in UTF-16.
    """
    for magic, (kind, fix) in _FOREIGN.items():
        if head[: len(magic)].lower() == magic.lower():
            raise DataError(f"this is {kind}, not preference data", where=shown, fix=fix)
    if head[1:2] == b"\0" and head[3:4] == b"\0":
        raise DataError(f"this is {_UTF16[0]}, not preference data", where=shown, fix=_UTF16[1])
