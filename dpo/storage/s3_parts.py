"""Multipart uploads of S3: their parts, and the texts that the service takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from dpo.storage.s3_client import parsed

PART_BYTES = 16 << 20
_MOST_PARTS = 10_000


@dataclass(frozen=True)
class Part:
    """A part that the store has."""

    number: int
    etag: str
    checksum: str
    """CRC-32, base64; empty where the service has none."""


def part_bytes(size: int) -> int:
    """How large the parts of a file of ``size`` bytes are."""
    return max(PART_BYTES, -(-size // _MOST_PARTS))


def completion(parts: Sequence[Part]) -> bytes:
    """The request to join parts."""
    lines = [
        f"<Part><PartNumber>{part.number}</PartNumber><ETag>{part.etag}</ETag>"
        + (f"<ChecksumCRC32>{part.checksum}</ChecksumCRC32>" if part.checksum else "")
        + "</Part>"
        for part in parts
    ]
    return f"<CompleteMultipartUpload>{''.join(lines)}</CompleteMultipartUpload>".encode()


def unfinished(answer: bytes, name: str, older_seconds: float) -> Iterator[str]:
    """Ids of the uploads to ``name``, of a service's list, that began so long ago."""
    now = datetime.now(UTC).timestamp()
    for upload in parsed(answer).findall("{*}Upload"):
        begun = datetime.fromisoformat(upload.findtext("{*}Initiated", "")).timestamp()
        if upload.findtext("{*}Key") == name and now - begun >= older_seconds:
            yield upload.findtext("{*}UploadId", "")
