"""Samples for the report: what differs between two answers marked, and what a filter goes by.

Prompts and answers are hostile text: they are escaped piece by piece before markup is added.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from dpo.evaluate.bounds import clipped, in_bytes, shortened

_MARKED_WORDS = 3000
_MARKED_PAIRS = 50_000
"""Longer answers, and those with more pairs of equal words, are shown without marks: the comparison
takes time that grows with both (half a minute for two answers that say two words 700 times)."""
BUDGET_BYTES = 600_000
"""Of all samples of a page; the others are in samples.json alone."""
_AROUND_BYTES = 650
"""About what stands around a sample's texts on the page."""

CHANGES = {
    "rose": "reward rose",
    "same": "same answer or reward",
    "fell": "reward fell",
}


def shown_samples(
    samples: Sequence[Mapping[str, Any]], budget: int = BUDGET_BYTES
) -> list[dict[str, Any]]:
    """The samples with marks and their ``change``, as many as have room in ``budget`` bytes."""
    found: list[dict[str, Any]] = []
    used = 0
    for sample in samples:
        item = _marked(sample)
        used += _size(item)
        if used > budget:
            break
        found.append(item)
    return found


def change_of(sample: Mapping[str, Any]) -> str:
    """Whether the policy's answer has a larger implicit reward than the SFT model's."""
    change = float(sample.get("reward_change") or 0.0)
    if sample["sft"] == sample["policy"] or change == 0:
        return "same"
    return "rose" if change > 0 else "fell"


def words_of(text: str) -> list[str]:
    """The words of a text and the spaces between them."""
    return re.findall(r"\s+|\S+", text)


def matched(left: Sequence[str], right: Sequence[str]) -> difflib.SequenceMatcher[str] | None:
    """The comparison of two lists of words; None where it would take too long."""
    counts, others = Counter(left), Counter(right)
    n_pairs = sum(n * others[word] for word, n in counts.items() if not word.isspace())
    if len(left) + len(right) > _MARKED_WORDS or n_pairs > _MARKED_PAIRS:
        return None
    # a space is no match by itself: there is one between any two words
    return difflib.SequenceMatcher(str.isspace, left, right, autojunk=False)


def _marked(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with the words that only one of the models wrote marked."""
    texts = {name: clipped(str(sample[name])) for name in ("prompt", "chosen", "sft", "policy")}
    left, right = words_of(texts["sft"]), words_of(texts["policy"])
    marked = {"sft": escape(texts["sft"]), "policy": escape(texts["policy"])}
    if matcher := matched(left, right):
        pieces = list(_pieces(left, right, matcher))
        join = Markup("").join
        marked = {"sft": join(a for a, _ in pieces), "policy": join(b for _, b in pieces)}
    published = sample.get("published")
    return {
        "pair_id": sample["pair_id"],
        "dataset": shortened(str(sample["dataset"])),
        "reward_change": sample.get("reward_change"),
        "change": change_of(sample),
        **texts,
        **marked,
        "published": None if published is None else clipped(str(published)),
    }


def _size(item: Mapping[str, Any]) -> int:
    """Bytes of a sample on the page: its texts as they are escaped there, and what is around."""
    texts = (item[name] or "" for name in ("prompt", "chosen", "sft", "policy", "published"))
    # its source stands in four places, one of the filter's choices among them
    name = in_bytes(escape(item["dataset"]))
    return _AROUND_BYTES + 4 * name + sum(in_bytes(escape(text)) for text in texts)


def _pieces(
    left: list[str], right: list[str], matcher: difflib.SequenceMatcher[str]
) -> Iterator[tuple[Markup, Markup]]:
    for operation, a, b, c, d in matcher.get_opcodes():
        old, new = escape("".join(left[a:b])), escape("".join(right[c:d]))
        same = operation == "equal"
        yield (
            old if same or not old else Markup("<del>{}</del>").format(old),
            new if same or not new else Markup("<ins>{}</ins>").format(new),
        )
