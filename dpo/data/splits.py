"""Which split the files of a source are, by their names and by the folders that they lie in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

from dpo.data.schema import SPLIT_WORDS, TEST, TRAIN
from dpo.data.unpack import COMPRESSED

# numbers of parts (00000-of-00001) say nothing
_WORDS = re.compile(r"[^\W\d_]+")
_OF_PARTS = "of"


def own_split(path: PurePath) -> str | None:
    """The split that a file's name states, or else the nearest folder's.

    The first or the last word does: ``train.jsonl.gz``, ``validation-00000-of-00001.parquet``,
    ``dpo_test.json``, ``test/0000.parquet``, ``train_prefs/data-00000-of-00001.arrow``.

    Args:
        path: Relative to the source: what lies above it is not its own.
    """
    name = path.name
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    names = (PurePath(name).stem, *reversed(path.parts[:-1]))
    found = map(_of_words, names)
    return next((split for split in found if split), None)


def _of_words(name: str) -> str | None:
    words = [word for word in _WORDS.findall(name.lower()) if word != _OF_PARTS]
    ends = (words[0], words[-1]) if words else ()
    return next((SPLIT_WORDS[word] for word in ends if word in SPLIT_WORDS), None)


def are_parts(stated: Iterable[str | None]) -> bool:
    """Whether files that state these splits are parts of one set.

    A single file named train.jsonl is all there is, not the training part of something.
    """
    return len(set(stated)) > 1


def parts_of_each_other(stated: Mapping[str, Iterable[str | None]]) -> dict[str, str]:
    """The split of each source that is one part, where one is train and another is test.

    ``datasets=[train.jsonl,test.jsonl]`` names one set as two sources.

    Args:
        stated: What the files of each source state.
    """
    words = {name: set(splits) for name, splits in stated.items()}
    single = {name: found.pop() for name, found in words.items() if len(found) == 1}
    parts = {name: split for name, split in single.items() if split}
    return parts if {TRAIN, TEST} <= set(parts.values()) else {}
