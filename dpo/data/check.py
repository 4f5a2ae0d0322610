"""Checks the rows of sources: in blocks, each by itself, in as many processes as there are cores.

A block is a file, or 32 MiB of a plain JSON Lines file: what the blocks are depends on the input
alone, so the result does too.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.config.sources import SourceConfig
from dpo.data.columns import Columns, Sound
from dpo.data.division import Shard, file_spans
from dpo.data.formats import Candidate, Parser, Rating, RowError
from dpo.data.lines import Piece, RawRow, json_row, piece_rows
from dpo.data.quarantine import Place, Rejected
from dpo.data.readers import count_rows, is_lines, line_pieces, rows
from dpo.data.registry import parser_of
from dpo.data.repeats import Mark
from dpo.data.schema import TEST, TRAIN
from dpo.data.sources import SourceFile
from dpo.data.spill import PartWriter, Tally
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits
from dpo.data.validate import Validator
from dpo.errors import DpoError
from dpo.storage.host_memory import keep_freed_memory
from dpo.storage.processes import FreshContext, die_with_parent

_SMALL_BYTES = 64 * 2**20
"""Less is read in this process: starting others takes a second."""
_STEP_ROWS = 500
_FEW_LINES = 32
"""Fewer are checked sooner one by one than as columns: many folders have one row a file."""
_COLLECT_EVERY = 50_000
"""Objects of Python that are made before the collector looks for circles among them."""
_REFERENCE_SEED = 42
_REFERENCE_TEST_SHARE = 0.01


@dataclass(frozen=True)
class Rules:
    """What all sources are checked against."""

    tokenizer: Path
    """Folder of the base model's tokenizer."""
    limits: Limits
    prompt_format: str
    test_fraction: float
    chat_template: str | None = None
    """Instead of the tokenizer's own."""
    trust_remote_code: bool = False
    """Whether code that comes with the tokenizer may run."""


@dataclass(frozen=True)
class Block:
    """Rows that are checked by one process."""

    source: SourceConfig
    number: int
    """Of the source."""
    place: Place
    path: Path
    folder: Path
    """To write to."""
    start: int = 0
    end: int | None = None
    """In bytes; None takes the whole file."""
    held_out: frozenset[int] | None = None
    """Numbers of the rows that are in the test split, from 0; the others are then in train."""

    @property
    def n_bytes(self) -> int:
        """How much there is to read."""
        return (self.path.stat().st_size if self.end is None else self.end) - self.start


def blocks_of(
    number: int,
    name: str,
    source: SourceConfig,
    files: Sequence[SourceFile],
    folder: Path,
    shard: Shard,
) -> list[Block]:
    """The shard's blocks of a source, in order; their output goes below ``folder``.

    Raises:
        DataError: a file cannot be read.
    """
    found: list[Block] = []
    if source.split == "reference":
        every = _with_reference_split(number, name, source, files, folder)
        return [block for index, block in enumerate(every) if shard.owns(index)]
    for index, file in enumerate(files):
        if not file.fetched:
            continue
        place = Place(name, file.shown, file.split)
        spans: Sequence[tuple[int, int | None]] = file.spans
        if not spans and is_lines(file.path, file.shown, plain=True):
            spans = file_spans(file.path)
        for position, (start, end) in enumerate(spans or [(0, None)]):
            if file.whole or shard.owns(index, position):
                part = folder / _block_name(number, index, position)
                found.append(Block(source, number, place, file.path, part, start, end))
    return found


def _with_reference_split(
    number: int, name: str, source: SourceConfig, files: Sequence[SourceFile], folder: Path
) -> list[Block]:
    """One block a file, with the test split of the reference code.

    It shuffles all rows as the datasets library does with seed 42 and holds out the first 1 %. This
    needs the number of rows before the first is read.
    """
    counts = [count_rows(file.path, file.shown) for file in files]
    total = sum(counts)
    order = np.random.default_rng(_REFERENCE_SEED).permutation(total)
    held_out = np.sort(order[: int(total * _REFERENCE_TEST_SHARE)])
    found, start = [], 0
    for index, (file, count) in enumerate(zip(files, counts, strict=True)):
        inside = held_out[(held_out >= start) & (held_out < start + count)] - start
        part = folder / _block_name(number, index, 0)
        place = Place(name, file.shown, None)
        rows_held_out = frozenset(inside.tolist())
        found.append(Block(source, number, place, file.path, part, held_out=rows_held_out))
        start += count
    return found


def _block_name(source: int, file: int, position: int) -> str:
    """Sorts as the blocks of an input are ordered."""
    return f"{source:03d}-{file:06d}-{position:06d}"


def check_blocks(
    blocks: Sequence[Block], rules: Rules, advance: Callable[[int], None], workers: int | None
) -> Iterator[Tally]:
    """The counts of each block, in order; pairs and rejects are in the blocks' folders.

    Args:
        blocks: What to check.
        rules: What to check it against.
        advance: Called with a number of rows that are done.
        workers: Processes; None takes one a core where there is much to read.

    Raises:
        DataError: a file cannot be read any further.
    """
    if workers is None:
        small = sum(block.n_bytes for block in blocks) < _SMALL_BYTES
        workers = 1 if small else len(os.sched_getaffinity(0))
    if min(workers, len(blocks)) < 2:
        for block in blocks:
            yield check_block(block, rules, advance)
        return
    # not fork: pyarrow and tokenizers have threads by now
    pool = ProcessPoolExecutor(workers, FreshContext(), _start_worker, (os.getpid(),))
    try:
        for tally in _in_order(pool, blocks, rules, 2 * workers):
            advance(tally.rows)
            yield tally
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, blocks: Sequence[Block], rules: Rules, ahead: int
) -> Iterator[Tally]:
    waiting = iter(blocks)
    running: list[Future[Tally]] = []
    while True:
        for block in islice(waiting, ahead - len(running)):
            running.append(pool.submit(check_block, block, rules))
        if not running:
            return
        yield running.pop(0).result()


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)
    # the collector need not look through what was imported, again and again
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY)
    # the megabytes of a piece are needed again for the next one
    if keep_freed_memory():
        pa.set_memory_pool(pa.system_memory_pool())
    _spare_pandas()


def _spare_pandas() -> None:
    """Keep Arrow from importing pandas, where it is installed: a second and 60 MiB a process.

    It asks once, with its first array of a list, and takes what cannot be imported for absent.
    Functions of the user's own may import pandas all the same.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas())
        pa.array([])
        sys.meta_path.pop(0)


class _NoPandas:
    """A finder of modules that does not find one."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ImportError("pandas is not needed here")


def check_block(
    block: Block, rules: Rules, advance: Callable[[int], None] = lambda _: None
) -> Tally:
    """Check the rows of a block and write what became of them into its folder."""
    parser = parser_of(block.source)
    validator = validator_of(block, rules)
    with PartWriter(block.folder) as part:
        one = partial(_check_row, parser=parser, validator=validator, part=part)
        if block.held_out is None and is_lines(block.path, block.place.file):
            _check_lines(block, validator, one, part, advance)
            return part.tally
        for row in rows(block.path, block.place.file):
            place = block.place
            if block.held_out is not None:
                split = TEST if part.tally.rows in block.held_out else TRAIN
                place = place._replace(split=split)
            part.tally.rows += 1
            one(row, place)
            if part.tally.rows % _STEP_ROWS == 0:
                advance(_STEP_ROWS)
        advance(part.tally.rows % _STEP_ROWS)
        return part.tally


def _check_lines(
    block: Block,
    validator: Validator,
    one: Callable[[RawRow, Place], None],
    part: PartWriter,
    advance: Callable[[int], None],
) -> None:
    """JSON Lines: sound rows of a piece at once, the others one by one, all in their order."""
    place, shown = block.place, block.place.file
    columns = Columns.for_source(block.source.format, validator, place.split)
    for piece in line_pieces(block.path, shown, block.start, block.end):
        before = part.tally.rows
        sound = columns.of_lines(piece) if columns and piece.n_ends >= _FEW_LINES else None
        if sound is None:
            for row in piece_rows(piece, shown):
                part.tally.rows += 1
                one(row, place)
        else:
            part.tally.rows += len(sound.keys)
            _accept(sound, piece, shown, part, lambda row: one(row, place))
        part.tally.lines += piece.n_ends
        advance(part.tally.rows - before)


def _accept(
    sound: Sound, piece: Piece, shown: str, part: PartWriter, one: Callable[[RawRow], None]
) -> None:
    ends = piece.ends() if sound.flagged else []
    start = 0
    for row in sound.flagged:
        part.accept_many(sound.batch.slice(start, row - start), sound.keys[start:row])
        line = piece.data[ends[row] : ends[row + 1] - 1]
        one(json_row(line, shown, piece.first + row))
        start = row + 1
    part.accept_many(sound.batch.slice(start), sound.keys[start:])
    part.write_many()


def _check_row(
    row: RawRow, place: Place, *, parser: Parser, validator: Validator, part: PartWriter
) -> None:
    """Every pair of a row that is sound goes in; the first that is not is the row's reason."""
    problem: RowError | None = None
    checked: Candidate | Rating | None = None
    try:
        if row.problem:
            raise RowError("unreadable", row.problem)
        for item in _parsed(row.value, parser):
            try:
                _keep(item, place.split, row.line, validator, part)
            except RowError as error:
                if problem is None:
                    problem = error.with_traceback(None)
                    checked = item
    except RowError as error:
        # its traceback would hold this frame, and with it the whole piece, in a circle
        problem = error.with_traceback(None)
    if problem is not None:
        part.reject(Rejected.of(problem, place, row.line, row.value, checked))


def _parsed(value: Any, parser: Parser) -> Sequence[Candidate | Rating]:
    """What the parser makes of a row; a row that it is not made for must not end the step.

    Raises:
        RowError: the row is at fault, or the parser failed on it.
    """
    try:
        return parser(value)
    except (RowError, DpoError, MemoryError, ImportError, OSError):
        raise
    except Exception as error:
        advice = f"reading the row failed with {type(error).__name__}: {str(error)[:200]}"
    # out here, or the reason would hold the error as its context, and with it the frames
    raise RowError("unreadable", f"{advice}; compare its fields with other rows'")


def _keep(
    item: Candidate | Rating, split: str | None, line: int, validator: Validator, part: PartWriter
) -> None:
    if item.split is None and split is not None:
        item = item._replace(split=split)
    if isinstance(item, Candidate):
        part.accept(validator.check(item), line)
    else:
        validator.check_text("prompt", item.prompt)
        validator.check_text(item.field, item.answer)
        part.rate(item, line)


def validator_of(block: Block, rules: Rules) -> Validator:
    """What checks the pairs of a block's source."""
    source = block.source
    own = source.test_fraction
    return Validator(
        tokenizer=_tokenizer(rules.tokenizer, rules.chat_template, rules.trust_remote_code),
        limits=rules.limits,
        prompt_format=rules.prompt_format,
        test_fraction=rules.test_fraction if own is None else own,
        dataset=block.place.source,
        split=source.split,
        max_prompt_tokens=source.max_prompt_tokens,
        mark=Mark(block.number, source.max_pairs_per_prompt or 0),
    )


@cache
def _tokenizer(folder: Path, chat_template: str | None, trusted: bool) -> Any:
    tokenizer = load_text_tokenizer(folder, trust_remote_code=trusted)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
