"""Answers of several runs to the same prompts, side by side, with what differs marked.

A word is marked in an answer when the SFT model of that run did not write it, and in the SFT
model's answer when none of the runs kept it. Texts are hostile: they are escaped before marks are
put around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from dpo.evaluate.bounds import clipped, in_bytes, shortened
from dpo.evaluate.samples import BUDGET_BYTES, change_of, matched, words_of

_LONGEST_CHARACTERS = 6000
_LONGEST_OF_ALL = 40_000
"""Characters of the answers to one prompt, all runs together."""
_SHORTEST = 300

Sample = Mapping[str, Any]


def shared_samples(runs: Sequence[Sequence[Sample] | None]) -> tuple[list[dict[str, Any]], int]:
    """What to show of the prompts that two or more runs answered, and how many had no room.

    Args:
        runs: The samples of each run, as its evaluation wrote them; None where it kept none.
    """
    answered = [{str(sample["prompt"]): sample for sample in samples or ()} for samples in runs]
    prompts = dict.fromkeys(prompt for samples in answered for prompt in samples)
    shared = [prompt for prompt in prompts if sum(prompt in samples for samples in answered) > 1]
    found: list[dict[str, Any]] = []
    used = 0
    for prompt in shared:
        item = _item(prompt, [samples.get(prompt) for samples in answered])
        used += _size(item)
        if used > BUDGET_BYTES:
            break
        found.append(item)
    return found, len(shared) - len(found)


def _item(prompt: str, samples: Sequence[Sample | None]) -> dict[str, Any]:
    """One prompt with the answers of each run, and those of the SFT models that differ."""
    longest = min(_LONGEST_CHARACTERS, max(_SHORTEST, _LONGEST_OF_ALL // len(samples)))
    first = next(sample for sample in samples if sample)
    runs_by_sft: dict[str, list[int]] = {}
    for number, sample in enumerate(samples):
        if sample:
            runs_by_sft.setdefault(clipped(str(sample["sft"]), longest), []).append(number)
    answers: list[dict[str, Any] | None] = [None] * len(samples)
    before = []
    for sft, numbers in runs_by_sft.items():
        asked = [samples[number] or {} for number in numbers]
        texts = [clipped(str(sample["policy"]), longest) for sample in asked]
        marked_sft, marked = marked_against(sft, texts)
        before.append({"runs": [] if len(runs_by_sft) == 1 else numbers, "text": marked_sft})
        for number, sample, text in zip(numbers, asked, marked, strict=True):
            change = sample.get("reward_change")
            answers[number] = {
                "text": text,
                "plain": clipped(str(sample["policy"]), longest),
                "reward_change": change,
                "change": change_of(sample),
            }
    return {
        "prompt": clipped(prompt),
        "dataset": shortened(str(first["dataset"])),
        "chosen": clipped(str(first["chosen"])),
        "before": before,
        "answers": answers,
        "changes": " ".join(answer["change"] if answer else "none" for answer in answers),
    }


def marked_against(before: str, after: Sequence[str]) -> tuple[Markup, list[Markup]]:
    """The first text with the words that none of the others has, and these with what is new."""
    old = words_of(before)
    kept: set[int] = set()
    marked = []
    for text in after:
        new = words_of(text)
        matcher = matched(old, new)
        if matcher is None:
            kept.update(range(len(old)))
            marked.append(Markup.escape(text))
            continue
        blocks = matcher.get_matching_blocks()
        kept.update(i for block in blocks for i in range(block.a, block.a + block.size))
        same = {i for block in blocks for i in range(block.b, block.b + block.size)}
        marked.append(_with_marks(new, same, Markup("<ins>{}</ins>")))
    return _with_marks(old, kept, Markup("<del>{}</del>")), marked


def _with_marks(words: Sequence[str], same: set[int], mark: Markup) -> Markup:
    pieces = []
    for unmarked, group in groupby(range(len(words)), key=lambda i: i in same):
        text = "".join(words[i] for i in group)
        pieces.append(Markup.escape(text) if unmarked else mark.format(text))
    return Markup("").join(pieces)


def _size(item: Mapping[str, Any]) -> int:
    """Bytes of an item's texts, and about what stands around them on the page."""
    texts: list[Iterable[str]] = [
        (Markup.escape(item["prompt"]), Markup.escape(item["chosen"]), item["changes"]),
        [Markup.escape(item["dataset"])] * 4,
        (part["text"] for part in item["before"]),
        (answer["text"] for answer in item["answers"] if answer),
    ]
    around = 600 + 250 * (len(item["answers"]) + len(item["before"]))
    return around + sum(in_bytes(text) for part in texts for text in part)
