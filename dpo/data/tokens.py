"""Token ids of all texts of an ingest output: made once, in parallel, kept by content.

The cache holds whole texts, before any limit: ``max_length`` and its like are applied when examples
are made of them (``tokenize.tokenize_pair``). So SFT, the reference, preference training and the
evaluation share one entry, with whatever limits. Its name is a hash of the pairs and the tokenizer.

    KEY/tokens-00000.parquet     pair_id, split, prompt, chosen, rejected, sft_target
    KEY/manifest.json            written last

``sft_target`` is null where it is the chosen response. The entries lie in ``DPO_TOKENS_DIR``, which
may be a volume that several pods share, else in ``tokens`` of the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo.config.places import tokens_dir
from dpo.data.parquet import PATTERN, Pairs
from dpo.data.schema import Pair
from dpo.data.tokenize import Limits, TokenizedExample, tokenize_pair
from dpo.errors import ArtifactError
from dpo.storage.manifest import Manifest, read_manifest, staged, write_manifest
from dpo.storage.progress import track

_VERSION = 1
_BATCH_ROWS = 1000
_CACHED_SHARE = 0.25
"""A run that needs less of the pairs has those alone tokenised, and nothing kept."""
_IDS = pa.large_list(pa.int32())
_RESPONSES = ("chosen", "rejected", "sft_target")
_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("prompt", _IDS, nullable=False),
        pa.field("chosen", _IDS, nullable=False),
        pa.field("rejected", _IDS, nullable=False),
        pa.field("sft_target", _IDS),
    ],
    metadata={b"dpo.tokens_version": str(_VERSION).encode()},
)
_STAGE = "tokens"


def tokenize_rows(
    pairs: Pairs, indices: Sequence[int], tokenizer: Any, limits: Limits, *, responses: str = "pair"
) -> list[TokenizedExample]:
    """Examples of some pairs, from the cache where it has them.

    Args:
        pairs: Of one split.
        indices: Which of them.
        tokenizer: The model's.
        limits: Longest lengths, in tokens.
        responses: ``pair`` (chosen and rejected) or ``sft_target``.

    Raises:
        DataError: the end-of-sequence token stands inside a text.
    """
    names = ("sft_target",) if responses == "sft_target" else ("chosen", "rejected")
    rows = [pairs.rows[index] for index in indices]
    known = _known_ids(pairs, indices, tokenizer, ("prompt", *names))
    return [
        tokenize_pair(
            row.prompt,
            [getattr(row, name) for name in names],
            tokenizer if known is None else _Known(tokenizer, row, known, number),
            limits,
            prompt_format=pairs.prompt_format,
            pair_id=row.pair_id,
        )
        for number, row in enumerate(rows)
    ]


class _Known:
    """Stands for the tokenizer of one row, whose texts' ids are known."""

    def __init__(
        self, tokenizer: Any, row: Pair, columns: Mapping[str, Sequence[Any]], number: int
    ) -> None:
        self.eos_token, self.eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id
        self._ids = {getattr(row, name): ids[number] for name, ids in columns.items()}

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": self._ids[text].tolist()}


def _known_ids(
    pairs: Pairs, indices: Sequence[int], tokenizer: Any, names: Sequence[str]
) -> dict[str, list[Any]] | None:
    """By column: the ids of each row; None for a tokenizer that has no fast form."""
    encode = _encoder(tokenizer, [pairs.rows[index].prompt for index in indices[:3]])
    if encode is None:
        return None
    if len(indices) >= _CACHED_SHARE * len(pairs.rows):
        # a read-only home, or no room: the examples are made without it
        with suppress(OSError):
            return _read(_cached(pairs.folder, tokenizer, encode), pairs, indices, names)
    rows = [pairs.rows[index] for index in indices]
    return {name: list(encode([getattr(row, name) for row in rows])) for name in names}


Encoder = Callable[[Sequence[str]], Iterator[Any]]


def _encoder(tokenizer: Any, probes: Sequence[str]) -> Encoder | None:
    """What gives the ids of many texts, on all cores, or None where it might give others."""
    backend = _backend(tokenizer)
    if backend is None:
        return None

    def encode(texts: Sequence[str]) -> Iterator[Any]:
        for start in range(0, len(texts), _BATCH_ROWS):
            batch = list(texts[start : start + _BATCH_ROWS])
            for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
                yield np.asarray(encoding.ids, dtype=np.int32)

    for text, ids in zip(probes, encode(probes), strict=True):
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids.tolist():
            return None
    return encode


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # what a call before may have set
        backend.no_truncation()
        backend.no_padding()
    return backend


def tokens_key(content_hash: str, tokenizer: Any) -> str:
    """Name of a cache entry: of the pairs' content and the tokenizer's, wherever they lie."""
    digest = hashlib.sha256(f"{_VERSION}\0{content_hash}\0".encode())
    digest.update(_backend(tokenizer).to_str().encode())
    return digest.hexdigest()[:32]


def fill_cache(folder: Path, tokenizer: Any) -> Path | None:
    """Tokenise an ingest output into the cache, unless it is there.

    Args:
        folder: Output of ingest.
        tokenizer: A transformers tokenizer.

    Returns:
        The entry; None where the tokenizer has no fast form.

    Raises:
        ArtifactError: the output is incomplete or changed.
        OSError: the cache cannot be written.
    """
    encode = _encoder(tokenizer, ["One text.", " Another"])
    return None if encode is None else _cached(folder, tokenizer, encode)


def _cached(folder: Path, tokenizer: Any, encode: Encoder) -> Path:
    content_hash = read_manifest(folder, stage="ingest", verify=False).content_hash
    root = tokens_dir()
    target = root / tokens_key(content_hash, tokenizer)
    root.mkdir(parents=True, exist_ok=True)
    # processes of one run ask at the same time: one makes it, the others wait
    with _locked(root / f"{target.name}.lock"):
        if not _is_whole(target):
            _write(folder, target, content_hash, encode)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder, stage=_STAGE)
    except ArtifactError:
        return False
    return True


def _write(folder: Path, target: Path, content_hash: str, encode: Encoder) -> Manifest:
    n_rows = sum(pq.read_metadata(path).num_rows for path in folder.glob(PATTERN))
    with staged(target, of_cache=True) as out, track("tokenize", "pairs", n_rows) as bar:
        n_tokens = 0
        with pq.ParquetWriter(out / "tokens-00000.parquet", _SCHEMA, compression="zstd") as writer:
            for path in sorted(folder.glob(PATTERN)):
                with pq.ParquetFile(path) as source:
                    for batch in source.iter_batches(_BATCH_ROWS, columns=list(Pair.__slots__)):
                        encoded = _encoded(batch, encode)
                        writer.write_batch(encoded)
                        n_tokens += sum(len(encoded[name].flatten()) for name in _SCHEMA.names[2:])
                        bar.advance(batch.num_rows)
        details = {"pairs": n_rows, "tokens": n_tokens}
        return write_manifest(out, _STAGE, inputs={"pairs": content_hash}, details=details)


def _encoded(batch: pa.RecordBatch, encode: Encoder) -> pa.RecordBatch:
    columns = [batch["pair_id"], batch["split"]]
    for name in ("prompt", *_RESPONSES):
        texts = batch[name]
        if name == "sft_target":
            texts = pc.if_else(pc.equal(texts, batch["chosen"]), None, texts)
        columns.append(_ids_column(texts, encode))
    return pa.record_batch(columns, schema=_SCHEMA)


def _ids_column(texts: pa.Array, encode: Encoder) -> pa.Array:
    given = texts.drop_null().to_pylist()
    ids = list(encode(given))
    there = texts.is_valid().to_numpy(zero_copy_only=False)
    lengths = np.zeros(len(texts), dtype=np.int64)
    lengths[there] = [len(one) for one in ids]
    ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *ids])
    mask = None if there.all() else pa.array(~there)
    return pa.LargeListArray.from_arrays(pa.array(ends), pa.array(flat, pa.int32()), mask=mask)


def _read(
    folder: Path, pairs: Pairs, indices: Sequence[int], names: Sequence[str]
) -> dict[str, list[Any]]:
    """The ids of some pairs of a split; the entry has the pairs in the order of ingest."""
    wanted = {*names, "chosen"} if "sft_target" in names else set(names)
    table = pq.read_table(
        folder / "tokens-00000.parquet",
        columns=["pair_id", *sorted(wanted)],
        filters=pc.field("split") == pairs.split,
    ).take(pa.array(indices, pa.int64()))
    ids = table["pair_id"].to_pylist()
    if ids != [pairs.rows[index].pair_id for index in indices]:
        raise ArtifactError(
            "the cached tokens are of other pairs",
            where=str(folder),
            fix=f"remove the folder {folder}",
        )
    columns = {name: _arrays(table[name].combine_chunks()) for name in wanted}
    if "sft_target" in names:
        targets = zip(columns["sft_target"], columns["chosen"], strict=True)
        columns["sft_target"] = [chosen if own is None else own for own, chosen in targets]
    return {name: columns[name] for name in names}


def _arrays(column: pa.Array) -> list[Any]:
    """Each list as an array; None for nulls."""
    flat, ends = column.values.to_numpy(), column.offsets.to_numpy()
    valid = column.is_valid().to_pylist()
    return [
        flat[start:end] if there else None
        for start, end, there in zip(ends[:-1], ends[1:], valid, strict=True)
    ]
