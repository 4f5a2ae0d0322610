"""The reference's log-probabilities on disk: one row a pair, one value a response token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.data.tokenize import TokenizedExample
from dpo.errors import ArtifactError
from dpo.storage.manifest import Manifest, read_manifest

Values = npt.NDArray[np.float32]
_FILE = "log_probs-00000.parquet"
_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("tokens_hash", pa.string(), nullable=False),
        pa.field("chosen", pa.list_(pa.float32()), nullable=False),
        pa.field("rejected", pa.list_(pa.float32()), nullable=False),
    ],
    metadata={b"dpo.log_probs_version": b"1"},
)


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probabilities of both responses of a pair, token by token."""

    split: str
    tokens_hash: str
    chosen: Values
    rejected: Values


def write_log_probs(folder: Path, rows: Iterable[tuple[str, PairLogProbs]]) -> None:
    """Write the Parquet file of a reference output."""
    items = list(rows)
    columns = [
        pa.array([pair_id for pair_id, _ in items], pa.string()),
        pa.array([row.split for _, row in items], pa.string()),
        pa.array([row.tokens_hash for _, row in items], pa.string()),
        pa.array([row.chosen.tolist() for _, row in items], pa.list_(pa.float32())),
        pa.array([row.rejected.tolist() for _, row in items], pa.list_(pa.float32())),
    ]
    pq.write_table(
        pa.Table.from_arrays(columns, schema=_SCHEMA), folder / _FILE, compression="zstd"
    )


def read_log_probs(folder: Path) -> dict[str, PairLogProbs]:
    """By pair id.

    Raises:
        ArtifactError: the output is incomplete or changed.
    """
    read_manifest(folder, stage="reference")
    table = pq.read_table(folder / _FILE)
    ids, splits, hashes = (table[name].to_pylist() for name in ("pair_id", "split", "tokens_hash"))
    chosen, rejected = (
        [np.asarray(values, dtype=np.float32) for values in table[name].to_pylist()]
        for name in ("chosen", "rejected")
    )
    rows = map(PairLogProbs, splits, hashes, chosen, rejected)
    return dict(zip(ids, rows, strict=True))


def check_scorer(scored: Manifest, model: str, where: Path, *, named: str, fix: str) -> None:
    """Refuse log-probabilities of another model: rewards would be measured against that one.

    Args:
        scored: Manifest of the reference; one that names no model passes.
        model: Content hash of the model that they must be of.
        where: Folder of the reference.
        named: How the message calls that model.
        fix: What to do.

    Raises:
        ArtifactError: they are of another one.
    """
    scorer = scored.inputs.get("model")
    if scorer and scorer != model:
        raise ArtifactError(
            f"the log-probabilities are of another model ({scorer[:12]}) than {named} "
            f"({model[:12]})",
            where=str(where),
            fix=fix,
        )


def select_log_probs(
    known: Mapping[str, PairLogProbs], examples: Sequence[TokenizedExample], where: Path
) -> list[PairLogProbs]:
    """The reference's values for ``examples``, which must be the same tokens.

    Raises:
        ArtifactError: a pair is missing, or was tokenised or truncated otherwise.
    """
    found = []
    for example in examples:
        row = known.get(example.pair_id)
        if row is None:
            raise ArtifactError(
                f"the reference has no log-probabilities of pair {example.pair_id}",
                where=str(where),
                fix="run the step reference again with these pairs and the same seed, "
                "n_examples and n_eval_examples",
            )
        if row.tokens_hash != example.tokens_hash():
            raise ArtifactError(
                f"the reference saw other tokens of pair {example.pair_id}",
                where=str(where),
                fix="use the same tokenizer, max_length, max_prompt_length and truncation_mode",
            )
        found.append(row)
    return found
