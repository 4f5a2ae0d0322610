"""Rated answers become pairs: each two answers to a prompt whose scores differ, the better chosen.

The answers to a prompt may stand anywhere in a source. So they are written to 64 files, chosen by
the prompt's hash, and each file is read by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import orjson

from dpo.data.formats import Candidate, Rating, RowError
from dpo.data.messages import candidate
from dpo.data.quarantine import Place, Rejected
from dpo.data.schema import TEST, prompt_digest
from dpo.data.shapes import MAX_ANSWERS
from dpo.data.spill import PartWriter, Tally, pack_rating, unpack_rating
from dpo.data.validate import Validator

_N_PARTITIONS = 64


class Answer(NamedTuple):
    """A rated answer and where it stands."""

    file: str
    line: int
    rating: Rating


def pair_ratings(
    answers: Iterator[Answer], source: str, validator: Validator, folder: Path
) -> Iterator[tuple[Path, Tally]]:
    """(folder, counts) of the pairs of each partition; in one order for one input.

    Args:
        answers: All of a source, in the order of the input.
        source: Its name.
        validator: Checks the pairs.
        folder: To write below.
    """
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        files = [
            stack.enter_context((folder / f"{number:02d}.jsonl").open("wb"))
            for number in range(_N_PARTITIONS)
        ]
        for answer in answers:
            number = prompt_digest(answer.rating.prompt)[-1] % _N_PARTITIONS
            files[number].write(
                orjson.dumps(
                    [answer.file, answer.line, pack_rating(answer.rating)],
                    option=orjson.OPT_APPEND_NEWLINE,
                )
            )
    for path in sorted(path for path in folder.glob("*.jsonl") if path.stat().st_size):
        part_folder = path.with_suffix("")
        with PartWriter(part_folder) as part:
            for group in _by_prompt(path):
                _pair_group(group, source, validator, part)
        path.unlink()
        yield part_folder, part.tally


def _by_prompt(path: Path) -> Sequence[list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    with path.open("rb") as file:
        for text in file:
            source_file, line, values = orjson.loads(text)
            rating = unpack_rating(values)
            groups.setdefault(rating.prompt, []).append(Answer(source_file, line, rating))
    return list(groups.values())


def _pair_group(group: list[Answer], source: str, validator: Validator, part: PartWriter) -> None:
    def reject(answer: Answer, error: RowError, pair: Candidate | None = None) -> None:
        place = Place(source, answer.file, answer.rating.split)
        part.reject(Rejected.of(error, place, answer.line, _row(answer.rating), pair))

    for answer in group[MAX_ANSWERS:]:
        advice = f"the prompt has more than {MAX_ANSWERS} rated answers: the first ones are used"
        reject(answer, RowError("over_prompt_limit", advice, "prompt"))
    group = group[:MAX_ANSWERS]
    if len(group) == 1:
        reject(
            group[0], RowError("one_answer", "no other answer to this prompt is rated", "prompt")
        )
    elif len({answer.rating.score for answer in group}) == 1:
        for answer in group:
            advice = "all answers to this prompt have one score"
            reject(answer, RowError("equal_scores", advice, "prompt"))
    else:
        _accept_pairs(group, validator, part, reject)


def _accept_pairs(
    group: list[Answer],
    validator: Validator,
    part: PartWriter,
    reject: Callable[[Answer, RowError, Candidate | None], None],
) -> None:
    best = max(group, key=lambda answer: answer.rating.score).rating.answer
    # a prompt with answers in both splits stays in test, as it does everywhere
    splits = {answer.rating.split for answer in group} - {None}
    split = TEST if TEST in splits else next(iter(splits), None)
    for one, two in combinations(group, 2):
        if one.rating.score == two.rating.score:
            continue
        better, worse = (one, two) if one.rating.score > two.rating.score else (two, one)
        found = None
        try:
            found = _pair(better.rating, worse.rating, best, split)
            part.accept(validator.check(found), better.line)
        except RowError as error:
            reject(worse, error, found)


def _pair(better: Rating, worse: Rating, best: str, split: str | None) -> Candidate:
    if better.messages is None:
        return Candidate(better.prompt, better.answer, worse.answer, best, split)
    found = candidate(better.messages, better.answer, worse.answer, split=split)
    return found._replace(sft_target=f" {best.strip()}")


def _row(rating: Rating) -> dict[str, object]:
    prompt = rating.messages and [message._asdict() for message in rating.messages]
    return {
        "prompt": prompt or rating.prompt,
        "completion": rating.answer,
        "score": rating.score,
    }
