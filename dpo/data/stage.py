"""The ingest stage: sources to validated Parquet pairs, with every rejected row and its reason.

Two passes, neither of which holds the data in memory. The first reads and checks rows in blocks and
spills sound pairs to disk, with a hash of each; hashes tell which pairs collide with others. The
second writes the remaining pairs, in the order of the input.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.data.assemble import Assembled, Cap, Part, assemble
from dpo.data.check import Block, Rules, blocks_of, check_blocks, validator_of
from dpo.data.quarantine import NOT_FAULTY, QUARANTINE
from dpo.data.ratings import Answer, pair_ratings
from dpo.data.report import SAMPLE_ROWS, write_report
from dpo.data.schema import arrow_schema
from dpo.data.sources import opened, source_fingerprints
from dpo.data.spill import Tally, read_ratings
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits
from dpo.errors import ConfigError, DataError
from dpo.storage.base_model import local_tokenizer
from dpo.storage.manifest import Manifest, staged, write_manifest
from dpo.storage.progress import message, track

_SHOWN_REASONS = 5


def run_ingest(
    config: RunConfig,
    output: Path,
    *,
    code: str = "",
    fingerprints: Mapping[str, str] | None = None,
    workers: int | None = None,
) -> Manifest:
    """Read, validate and write the pairs of ``config.sources`` into the folder ``output``.

    Args:
        config: Settings.
        output: Folder to make.
        code: Fingerprint of the code, kept in the manifest.
        fingerprints: Of the sources, where they are known.
        workers: Processes to check rows in; None decides by the cores and the size of the input.
            The output does not depend on it.

    Raises:
        ConfigError: the model's tokenizer cannot be used.
        DataError: a source that is missing or unreadable, more than ``max_rejected_share`` rows
            rejected, or a split without a pair.
    """
    rules = _rules(config)
    with staged(output) as folder:
        if fingerprints is None:
            fingerprints = source_fingerprints(config)
        result = _ingest(config, rules, folder, workers)
        _refuse_bad_share(config, result, folder, output)
        _refuse_empty_split(result)
        figures = result.figures()
        tokenizer = load_text_tokenizer(rules.tokenizer)
        write_report(
            {
                "figures": figures,
                "sources": dict(fingerprints),
                "near_duplicates": result.near_examples,
            },
            result.sample,
            result.total().examples,
            tokenizer,
            rules.limits,
            folder,
        )
        manifest = write_manifest(
            folder,
            "ingest",
            settings=stage_settings(config, "ingest"),
            inputs={},
            code=code,
            details={"metrics": _scalars(figures), "sources": dict(fingerprints)},
        )
    _tell(figures)
    return manifest


def check_only(config: RunConfig) -> Assembled:
    """Read and validate the sources of ``config`` and keep nothing but counts and examples.

    Raises:
        ConfigError: the model's tokenizer cannot be used.
        DataError: a source that is missing, unreadable or empty.
    """
    with TemporaryDirectory() as folder:
        return _ingest(config, _rules(config), Path(folder), None)


def _ingest(config: RunConfig, rules: Rules, folder: Path, workers: int | None) -> Assembled:
    spill = folder / "spill"
    parts = _check_sources(config, rules, spill, workers)
    weights = {name: source.weight for name, source in config.sources.items()}
    result = assemble(
        parts,
        _caps(config),
        folder,
        schema=arrow_schema(config.prompt_format, weights),
        sample_rows=SAMPLE_ROWS,
        seed=config.seed,
    )
    shutil.rmtree(spill)
    _refuse_empty_source(result)
    return result


def _rules(config: RunConfig) -> Rules:
    place = local_tokenizer(config.model)
    tokenizer = load_text_tokenizer(place)
    if config.prompt_format == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "prompt_format=chat, but the model's tokenizer has no chat template",
            where=str(place),
            fix="use prompt_format=raw, or a model with a chat template",
        )
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    return Rules(place, limits, config.prompt_format, config.test_fraction)


def _caps(config: RunConfig) -> dict[str, Cap]:
    return {
        name: Cap(source.max_pairs, config.seed if source.seed is None else source.seed)
        for name, source in config.sources.items()
        if source.max_pairs is not None
    }


def _check_sources(
    config: RunConfig, rules: Rules, folder: Path, workers: int | None
) -> list[Part]:
    """Check every row; what was fetched from a store is there until all blocks are done."""
    with ExitStack() as stack, track("ingest", "rows", None) as bar:
        blocks: list[Block] = []
        for number, (name, source) in enumerate(config.sources.items()):
            files = stack.enter_context(opened(name, source))
            blocks += blocks_of(number, name, source, files, folder)
        before = _states(blocks)
        parts: list[Part] = []
        for block, tally in zip(
            blocks, check_blocks(blocks, rules, bar.advance, workers), strict=True
        ):
            parts.append(_placed(block, tally, parts[-1] if parts else None))
        _refuse_changed(blocks, before)
    return [part for group in _by_source(parts) for part in (*group, *_rated(group, rules))]


def _by_source(parts: Sequence[Part]) -> list[list[Part]]:
    return [list(group) for _, group in groupby(parts, lambda part: part.block.number)]


def _rated(parts: Sequence[Part], rules: Rules) -> Iterator[Part]:
    """The pairs that rated answers of one source make."""
    if not any(part.tally.ratings for part in parts):
        return
    first = parts[0].block
    answers = (
        Answer(part.block.place.file, line + part.line_offset, rating)
        for part in parts
        for line, rating in read_ratings(part.block.folder)
    )
    one_file = len({part.block.path for part in parts}) == 1
    shown = first.place.file if one_file else f"{first.place.source}: rated answers"
    place = first.place._replace(file=shown)
    folder = first.folder.with_name(f"{first.number:03d}-ratings")
    validator = validator_of(first, rules)
    for part_folder, tally in pair_ratings(answers, place.source, validator, folder):
        yield Part(replace(first, place=place, folder=part_folder), tally, 0)


def _placed(block: Block, tally: Tally, previous: Part | None) -> Part:
    """The block as a part, with its examples' lines counted from the start of the file."""
    offset = 0
    if previous and (previous.block.place, previous.block.path) == (block.place, block.path):
        offset = previous.line_offset + previous.tally.lines
    for items in tally.examples.values():
        items[:] = [item.moved(offset) for item in items]
    return Part(block, tally, offset)


def _states(blocks: Sequence[Block]) -> dict[Path, tuple[int, int]]:
    """Size and time of change of each file."""
    found = {block.path: block.path.stat() for block in blocks}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def _refuse_changed(blocks: Sequence[Block], before: dict[Path, tuple[int, int]]) -> None:
    for block in blocks:
        state = block.path.stat() if block.path.exists() else None
        if state is None or (state.st_size, state.st_mtime_ns) != before[block.path]:
            raise DataError(
                "the file changed while it was read",
                where=block.place.file,
                fix="wait until it is written, then run again",
            )


def _scalars(figures: dict[str, Any]) -> dict[str, int]:
    return {key: value for key, value in figures.items() if isinstance(value, int)}


def _refuse_empty_source(result: Assembled) -> None:
    for name, tally in result.sources.items():
        if not tally.rows:
            raise DataError(
                "the data set is empty",
                where=f"sources.{name}",
                fix="give a file with at least one row",
            )


def _refuse_bad_share(config: RunConfig, result: Assembled, folder: Path, output: Path) -> None:
    tally = result.total()
    bad = {reason: n for reason, n in tally.reasons.items() if reason not in NOT_FAULTY}
    n_bad = sum(bad.values())
    share = n_bad / tally.rows
    if share <= config.max_rejected_share:
        return
    kept = output.absolute().with_name(f"{output.name}.{QUARANTINE}")
    shutil.move(folder / QUARANTINE, kept)
    examples = [item for reason in bad for item in tally.examples[reason]]
    first = "\n".join(f"    {item}" for item in examples[:_SHOWN_REASONS])
    raise DataError(
        f"{n_bad:,} of {tally.rows:,} rows are unusable ({share:.1%}; at most "
        f"{config.max_rejected_share:.1%} are allowed). For example:\n{first}",
        where=f"all of them with reasons: {kept}",
        fix="mend these rows, or allow more with max_rejected_share (1 drops any number)",
    )


def _refuse_empty_split(result: Assembled) -> None:
    n_train, n_pairs = result.train_pairs, result.total().pairs
    for split, count in (("train", n_train), ("test", n_pairs - n_train)):
        if not count:
            raise DataError(
                f"no pair is in the {split} split ({n_pairs} pairs in all)",
                where="test_fraction",
                fix="give more pairs, or another test_fraction",
            )


def _tell(figures: dict[str, Any]) -> None:
    if figures["rejected"]:
        reasons = ", ".join(f"{count} {name}" for name, count in figures["reasons"].items())
        message(
            "ingest", f"{figures['rejected']:,} of {figures['rows']:,} rows rejected: {reasons}"
        )
