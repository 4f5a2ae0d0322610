"""The ingest stage: sources to validated Parquet pairs, with every rejected row and its reason."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.config.schema import RunConfig, SourceConfig
from dpo.config.stages import stage_settings
from dpo.data import formats, validate
from dpo.data.readers import RawRow, rows
from dpo.data.report import write_report
from dpo.data.schema import COLUMNS, TEST, TRAIN, Pair, arrow_schema
from dpo.data.sources import opened, source_fingerprint
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits
from dpo.errors import ConfigError, DataError
from dpo.storage.base_model import local_tokenizer
from dpo.storage.manifest import Manifest, staged, write_manifest
from dpo.storage.progress import Bar, message, track

QUARANTINE = "quarantine.jsonl"
_SHOWN_REASONS = 5
_SUBSET_STREAM = 7


@dataclass
class Ingested:
    """What became of all rows."""

    pairs: list[Pair] = field(default_factory=list)
    rejected: list[validate.Rejected] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    """Rows read, by source."""


def run_ingest(config: RunConfig, output: Path, *, code: str = "") -> Manifest:
    """Read, validate and write the pairs of ``config.sources`` into the folder ``output``.

    Raises:
        DataError: a source that is missing or unreadable, more than ``max_rejected_share`` rows
            rejected, or a split without a pair.
    """
    validator = _validator(config)
    result = Ingested()
    fingerprints = {}
    with track("ingest", "rows", None) as bar:
        for name, source in config.sources.items():
            fingerprints[name] = source_fingerprint(name, source)
            _read_source(name, source, config, validator, result, bar)
    _move_leaks(result)
    with staged(output) as folder:
        _write_quarantine(result, folder)
        figures = _figures(result, validator)
        _refuse_bad_share(config, result, output)
        _refuse_empty_split(result)
        _write_pairs(result.pairs, config.prompt_format, folder)
        report = {"figures": figures, "sources": fingerprints}
        write_report(report, result.pairs, result.rejected, folder)
        manifest = write_manifest(
            folder,
            "ingest",
            settings=stage_settings(config, "ingest"),
            inputs={},
            code=code,
            details={"metrics": _scalars(figures)},
        )
    _tell(figures)
    return manifest


def _validator(config: RunConfig) -> validate.Validator:
    place = local_tokenizer(config.model)
    tokenizer = load_text_tokenizer(place)
    if config.prompt_format == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "prompt_format=chat, but the model's tokenizer has no chat template",
            where=str(place),
            fix="use prompt_format=raw, or a model with a chat template",
        )
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    return validate.Validator(tokenizer, limits, config.prompt_format, config.test_fraction)


def _read_source(
    name: str,
    source: SourceConfig,
    config: RunConfig,
    validator: validate.Validator,
    result: Ingested,
    bar: Bar,
) -> None:
    accepted: list[Pair] = []
    format_name = source.format
    with opened(name, source) as files:
        for file in files:
            for row in rows(file.path, file.shown):
                bar.advance()
                result.rows[name] += 1
                try:
                    if row.problem:
                        raise formats.RowError("unreadable", row.problem)
                    if format_name == "auto":
                        format_name = _detect(row)  # type: ignore[assignment]
                    accepted += _parse(row, name, format_name, file.split, validator)
                except formats.RowError as error:
                    result.rejected.append(_rejection(name, row, error))
    if not result.rows[name]:
        raise DataError(
            "the data set is empty",
            where=f"sources.{name}",
            fix="give a file with at least one row",
        )
    result.pairs += _subset(accepted, source.max_pairs, config.seed)


def _detect(row: RawRow) -> str:
    found = formats.detect(row.value)
    if found is None:
        keys = ", ".join(map(str, row.value)) if isinstance(row.value, dict) else "no object"
        raise DataError(
            f"cannot tell the format of the data: the first row has {keys}",
            where=f"{row.file}, line {row.line}",
            fix="use the keys prompt, chosen and rejected, or set sources.NAME.format",
        )
    return found


def _parse(
    row: RawRow, name: str, format_name: str, split: str | None, validator: validate.Validator
) -> list[Pair]:
    if not isinstance(row.value, dict):
        kind = type(row.value).__name__
        raise formats.RowError("wrong_type", f"expected an object with fields, found a {kind}")
    candidates = formats.PARSERS[format_name](row.value)
    found = []
    for candidate in candidates:
        if candidate.split is None and split is not None:
            candidate = formats.with_split(candidate, split)
        found.append(validator.check(candidate, name, f"{row.file}, line {row.line}"))
    return found


def _rejection(name: str, row: RawRow, error: formats.RowError) -> validate.Rejected:
    return validate.Rejected(
        name, row.file, row.line, error.reason, error.field, error.advice, row.value
    )


def _subset(pairs: list[Pair], most: int | None, seed: int) -> list[Pair]:
    if most is None or len(pairs) <= most:
        return pairs
    generator = np.random.default_rng([seed, _SUBSET_STREAM])
    chosen = sorted(generator.choice(len(pairs), most, replace=False).tolist())
    return [pairs[index] for index in chosen]


def _move_leaks(result: Ingested) -> None:
    """No prompt is in both splits: where it is, it stays in test and its training pairs go."""
    leaked = validate.leaked_prompts(result.pairs)
    for pair in result.pairs:
        if pair.pair_id in leaked:
            row = dict(zip(COLUMNS, astuple(pair), strict=True))
            result.rejected.append(
                validate.Rejected(
                    pair.dataset,
                    pair.dataset,
                    0,
                    "prompt_in_test",
                    "prompt",
                    "the prompt is held out for evaluation, so it cannot be trained on",
                    row,
                )
            )
    result.pairs = [pair for pair in result.pairs if pair.pair_id not in leaked]


def _figures(result: Ingested, validator: validate.Validator) -> dict[str, Any]:
    reasons = Counter(item.reason for item in result.rejected)
    return {
        "rows": sum(result.rows.values()),
        "rows_by_source": dict(result.rows),
        "pairs": len(result.pairs),
        "train_pairs": sum(pair.split == TRAIN for pair in result.pairs),
        "test_pairs": sum(pair.split == TEST for pair in result.pairs),
        "rejected": len(result.rejected),
        "reasons": dict(reasons.most_common()),
        "truncated": dict(validator.truncated),
    }


def _scalars(figures: dict[str, Any]) -> dict[str, int]:
    return {key: value for key, value in figures.items() if isinstance(value, int)}


def _refuse_bad_share(config: RunConfig, result: Ingested, output: Path) -> None:
    total = sum(result.rows.values())
    # held-out prompts are sound rows in the wrong place
    bad = [item for item in result.rejected if item.reason not in ("prompt_in_test", "duplicate")]
    share = len(bad) / total
    if share <= config.max_rejected_share:
        return
    kept = output.with_name(f"{output.name}.{QUARANTINE}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("w", encoding="utf-8") as file:
        for item in result.rejected:
            file.write(json.dumps(item.as_json(), ensure_ascii=False, default=str) + "\n")
    first = "\n".join(f"    {item}" for item in bad[:_SHOWN_REASONS])
    raise DataError(
        f"{len(bad):,} of {total:,} rows are unusable ({share:.1%}; at most "
        f"{config.max_rejected_share:.1%} are allowed). The first:\n{first}",
        where=f"all of them with reasons: {kept}",
        fix="mend these rows, or allow more with max_rejected_share",
    )


def _refuse_empty_split(result: Ingested) -> None:
    for split in (TRAIN, TEST):
        if not any(pair.split == split for pair in result.pairs):
            raise DataError(
                f"no pair is in the {split} split ({len(result.pairs)} pairs in all)",
                where="test_fraction",
                fix="give more pairs, or another test_fraction",
            )


def _write_pairs(pairs: list[Pair], prompt_format: str, folder: Path) -> None:
    schema = arrow_schema(prompt_format)
    columns = [pa.array([getattr(pair, name) for pair in pairs], pa.string()) for name in COLUMNS]
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(table, folder / "pairs-00000.parquet", compression="zstd")


def _write_quarantine(result: Ingested, folder: Path) -> None:
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file:
        for item in result.rejected:
            line = json.dumps(item.as_json(), ensure_ascii=False, default=str)
            file.write(line.encode("utf-8", "backslashreplace").decode() + "\n")


def _tell(figures: dict[str, Any]) -> None:
    if figures["rejected"]:
        reasons = ", ".join(f"{count} {name}" for name, count in figures["reasons"].items())
        message(
            "ingest", f"{figures['rejected']:,} of {figures['rows']:,} rows rejected: {reasons}"
        )
