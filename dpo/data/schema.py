"""The pair row: the contract between ingest and every later step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import orjson
import pyarrow as pa

SCHEMA_VERSION = 2
VERSION_KEY = b"dpo.schema_version"
PROMPT_FORMAT_KEY = b"dpo.prompt_format"
WEIGHTS_KEY = b"dpo.weights"
"""JSON: weight by source, where any differs from 1."""
CHAT_TEMPLATE_KEY = b"dpo.chat_template"
"""Text of the template that made the prompts, where it was chosen for them: the model that learns
from them needs it as well. Missing where prompts are raw or the tokenizer's own template made them.
"""

TRAIN, TEST = "train", "test"
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("test", "testing", "validation", "valid", "val", "dev"), TEST),
    **dict.fromkeys(("eval", "evaluation"), TEST),
}
"""What a row's own ``split``, or the name of a file, may say; in small letters or others."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: for ``prompt`` people preferred ``chosen`` to ``rejected``."""

    prompt: str
    chosen: str
    rejected: str
    sft_target: str
    """What SFT trains on: the chosen response, unless the source names another."""
    dataset: str
    """Name of the source."""
    split: str
    """``train`` or ``test``."""
    pair_id: str
    """Stable over runs and machines: see ``pair_id``."""


COLUMNS = tuple(Pair.__dataclass_fields__)
MESSAGES_COLUMN = "prompt_messages"
"""The prompt as turns, null where the source has text only; since version 2."""
_TURN = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])


def pair_fields() -> list[pa.Field]:
    """The columns of a pair row."""
    texts = [pa.field(name, pa.string(), nullable=False) for name in COLUMNS]
    return [*texts, pa.field(MESSAGES_COLUMN, pa.list_(_TURN))]


def arrow_schema(
    prompt_format: str,
    weights: Mapping[str, float] | None = None,
    chat_template: str | None = None,
) -> pa.Schema:
    """Columns of the Parquet files, with the schema version in their metadata."""
    metadata = {
        VERSION_KEY: str(SCHEMA_VERSION).encode(),
        PROMPT_FORMAT_KEY: prompt_format.encode(),
    }
    if weights and set(weights.values()) != {1.0}:
        metadata[WEIGHTS_KEY] = orjson.dumps(dict(weights), option=orjson.OPT_SORT_KEYS)
    if chat_template is not None:
        metadata[CHAT_TEMPLATE_KEY] = chat_template.encode()
    return pa.schema(pair_fields(), metadata=metadata)


def pair_id(prompt: str, chosen: str, rejected: str) -> str:
    """The first 32 hex digits of sha256 over the three texts as a JSON list without spaces."""
    return hashlib.sha256(orjson.dumps([prompt, chosen, rejected])).hexdigest()[:32]


def prompt_digest(prompt: str) -> bytes:
    """sha256 of the prompt: it chooses the split and tells prompts apart."""
    return hashlib.sha256(b"split\0" + prompt.encode("utf-8")).digest()


def split_of(digest: bytes, test_fraction: float) -> str:
    """``test`` for a fixed share of all prompts, by their hash: added data moves no old row."""
    return TEST if int.from_bytes(digest[:8], "big") / 2**64 < test_fraction else TRAIN
