"""Reads the pairs that ingest wrote, after checking that they are whole and of a known schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.data.schema import (
    CHAT_TEMPLATE_KEY,
    COLUMNS,
    PROMPT_FORMAT_KEY,
    SCHEMA_VERSION,
    VERSION_KEY,
    WEIGHTS_KEY,
    Pair,
)
from dpo.errors import ArtifactError
from dpo.storage.manifest import read_manifest

PATTERN = "pairs-*.parquet"


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split."""

    rows: list[Pair]
    prompt_format: str
    """``raw`` or ``chat``: whether prompts hold special tokens of a chat template."""
    content_hash: str
    """Of the whole ingest output: the data's fingerprint in later manifests."""
    weights: Mapping[str, float]
    """How often a pair of each source comes in an epoch; 1 for sources that are not named."""
    folder: Path
    """Where they were read."""
    split: str
    chat_template: str | None = None
    """Text of the template that made the prompts, where it is not the tokenizer's own."""


def read_pairs(folder: Path, split: str) -> Pairs:
    """The pairs of ``split`` (``train`` or ``test``), in the order in which ingest wrote them.

    Raises:
        ArtifactError: the output is incomplete or changed, or has another schema.
    """
    manifest = read_manifest(folder, stage="ingest")
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise ArtifactError(f"no {PATTERN} in the output of ingest", where=str(folder))
    tables = [_read(path) for path in files]
    metadata = tables[0].schema.metadata
    template = metadata.get(CHAT_TEMPLATE_KEY)
    table = pa.concat_tables(tables)
    table = table.filter(pa.compute.equal(table["split"], split))
    columns = [table[name].to_pylist() for name in COLUMNS]
    return Pairs(
        rows=[Pair(*values) for values in zip(*columns, strict=True)],
        prompt_format=metadata[PROMPT_FORMAT_KEY].decode(),
        content_hash=manifest.content_hash,
        weights=orjson.loads(metadata.get(WEIGHTS_KEY, b"{}")),
        folder=folder,
        split=split,
        chat_template=None if template is None else template.decode(),
    )


def _read(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"not a readable Parquet file: {error}", where=str(path)) from None
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version is None or int(version) > SCHEMA_VERSION:
        found = "none" if version is None else version.decode()
        raise ArtifactError(
            f"pairs of schema version {found}; this code reads up to {SCHEMA_VERSION}",
            where=str(path),
            fix="run ingest again with this version",
        )
    wrong = [
        name
        for name in COLUMNS
        if name not in table.column_names or table.schema.field(name).type != pa.string()
    ]
    if wrong:
        raise ArtifactError(
            f"columns are missing or hold no text: {', '.join(wrong)}",
            where=str(path),
            fix="run ingest again",
        )
    # version 1 had no message lists
    return table.select(COLUMNS)
