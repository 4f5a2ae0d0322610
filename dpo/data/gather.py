"""Checked blocks of all sources, put in order: from this machine, or from the outputs of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from dpo.config.schema import RunConfig
from dpo.data.check import Block, Rules, blocks_of, check_blocks, validator_of
from dpo.data.division import Shard
from dpo.data.parts import Part
from dpo.data.ratings import Answer, pair_ratings
from dpo.data.sources import opened, with_splits_of_others
from dpo.data.spill import Tally, read_ratings
from dpo.errors import DataError
from dpo.storage.progress import track

Checked = tuple[Block, Tally]


def check_sources(
    config: RunConfig, rules: Rules, folder: Path, workers: int | None, shard: Shard
) -> list[Checked]:
    """Check the rows of the shard's blocks; what was fetched is there until all are done.

    Raises:
        DataError: a source that is missing, unreadable, or changes meanwhile.
    """
    with ExitStack() as stack, track("ingest", "rows", None) as bar:
        files = {}
        for name, source in config.sources.items():
            # the reference code's split needs the number of rows of all files
            part = Shard() if source.split == "reference" else shard
            files[name] = stack.enter_context(opened(name, source, part))
        files = with_splits_of_others(config.sources, files)
        blocks: list[Block] = []
        for number, (name, source) in enumerate(config.sources.items()):
            blocks += blocks_of(number, name, source, files[name], folder, shard)
        before = _states(blocks)
        tallies = check_blocks(blocks, rules, bar.advance, workers)
        checked = list(zip(blocks, tallies, strict=True))
        _refuse_changed(blocks, before)
    return checked


def in_order(checked: Sequence[Checked], rules: Rules, folder: Path) -> list[Part]:
    """All blocks as parts of the whole, and after those of a source the pairs of its ratings.

    Args:
        checked: Of all shards, in any order.
        rules: What they were checked against.
        folder: To write the pairs of ratings below.
    """
    parts: list[Part] = []
    for block, tally in sorted(checked, key=lambda item: item[0].folder.name):
        parts.append(_placed(block, tally, parts[-1] if parts else None))
    groups = [list(group) for _, group in groupby(parts, lambda part: part.block.number)]
    return [part for group in groups for part in (*group, *_rated(group, rules, folder))]


def _rated(parts: Sequence[Part], rules: Rules, folder: Path) -> Iterator[Part]:
    """The pairs that rated answers of one source make."""
    if not any(part.tally.ratings for part in parts):
        return
    first = parts[0].block
    answers = (
        Answer(part.block.place.file, line + part.line_offset, rating)
        for part in parts
        if part.tally.ratings
        for line, rating in read_ratings(part.block.folder)
    )
    one_file = len({part.block.path for part in parts}) == 1
    shown = first.place.file if one_file else f"{first.place.source}: rated answers"
    place = first.place._replace(file=shown)
    target = folder / f"{first.number:03d}-ratings"
    validator = validator_of(first, rules)
    for part_folder, tally in pair_ratings(answers, place.source, validator, target):
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
