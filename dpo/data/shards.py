"""Ingest as several tasks: each checks its share of the blocks, one more puts them together.

A shard's output is a folder with a manifest, ``shard.json`` (which blocks, and their counts) and
the blocks' own folders. The result of all is byte for byte what one task would have written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.data.check import Block
from dpo.data.division import Shard
from dpo.data.gather import Checked, check_sources
from dpo.data.quarantine import Place, Rejected
from dpo.data.rules import rules_of
from dpo.data.sources import source_fingerprints
from dpo.data.spill import Tally
from dpo.errors import ArtifactError, ConfigError
from dpo.storage.manifest import Manifest, read_manifest, staged, write_manifest

_STAGE = "ingest_shard"
_INDEX = "shard.json"
_BLOCKS = "blocks"


def parse_shard(text: str) -> Shard:
    """``2/8`` as a shard.

    Raises:
        ConfigError: it is something else.
    """
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"shard={text} names no shard", fix="write shard=1/4 to shard=4/4")
    return Shard(int(number), int(of))


def run_shard(
    config: RunConfig,
    output: Path,
    shard: Shard,
    *,
    code: str = "",
    fingerprints: Mapping[str, str] | None = None,
    workers: int | None = None,
) -> Manifest:
    """Check one shard's share of the sources into the folder ``output``.

    Args:
        config: Settings of ingest; the same for all shards.
        output: Folder to make.
        shard: Which one.
        code: Fingerprint of the code, kept in the manifest.
        fingerprints: Of the sources, where they are known.
        workers: Processes to check rows in; None decides by the cores and the size of the input.

    Raises:
        ConfigError: the model's tokenizer cannot be used.
        DataError: a source that is missing or unreadable.
    """
    rules = rules_of(config)
    with staged(output) as folder:
        found = dict(fingerprints or source_fingerprints(config))
        checked = check_sources(config, rules, folder / _BLOCKS, workers, shard)
        entries = [_entry(block, tally) for block, tally in checked]
        # half characters in the examples are escaped, and come back as they were
        (folder / _INDEX).write_text(json.dumps(entries, indent=1), encoding="utf-8")
        return write_manifest(
            folder,
            _STAGE,
            settings=stage_settings(config, "ingest"),
            inputs=found,
            code=code,
            details={"shard": str(shard), "rows": sum(tally.rows for _, tally in checked)},
        )


def read_shards(config: RunConfig, folders: Sequence[Path]) -> tuple[list[Checked], dict[str, str]]:
    """The blocks of all shards, and the fingerprints of the sources that they read.

    Raises:
        ArtifactError: a shard is missing, incomplete, or was made with other data or settings.
    """
    manifests = {folder: read_manifest(folder, stage=_STAGE) for folder in folders}
    _refuse_gaps([manifests[folder].details["shard"] for folder in folders])
    first = next(iter(manifests.values()))
    wanted = stage_settings(config, "ingest")
    for folder, manifest in manifests.items():
        for what, found, expected in (
            ("settings", manifest.settings, wanted),
            ("data", manifest.inputs, first.inputs),
            ("code", manifest.code, first.code),
        ):
            if found != expected:
                raise ArtifactError(
                    f"the shard was made with other {what}",
                    where=str(folder),
                    fix="run all shards again with the same settings and sources",
                )
    checked = []
    for folder in folders:
        for entry in json.loads((folder / _INDEX).read_text(encoding="utf-8")):
            checked.append(_checked(config, folder, entry))
    return checked, dict(first.inputs)


def _refuse_gaps(names: Sequence[str]) -> None:
    shards = [parse_shard(name) for name in names]
    of = shards[0].of if shards else 0
    wanted = [Shard(number, of) for number in range(1, of + 1)]
    if sorted(shards, key=lambda shard: shard.number) != wanted or not shards:
        raise ArtifactError(
            f"these are not all shards of one set: {', '.join(names) or 'none'}",
            where="shards",
            fix="give each of 1/N to N/N once",
        )


def _entry(block: Block, tally: Tally) -> dict[str, Any]:
    examples = {reason: list(map(asdict, items)) for reason, items in tally.examples.items()}
    return {
        "folder": block.folder.name,
        "number": block.number,
        "place": list(block.place),
        "tally": {**vars(tally), "examples": examples},
    }


def _checked(config: RunConfig, folder: Path, entry: Mapping[str, Any]) -> Checked:
    place, values = Place(*entry["place"]), entry["tally"]
    examples = {
        reason: [Rejected(**item) for item in items] for reason, items in values["examples"].items()
    }
    tally = Tally(**{**values, "reasons": Counter(values["reasons"]), "examples": examples})
    # blocks of one file: all of its name but the number of the block
    file = Path(entry["folder"].rpartition("-")[0])
    name = entry["folder"]
    block = Block(
        config.sources[place.source], entry["number"], place, file, folder / _BLOCKS / name
    )
    return block, tally
