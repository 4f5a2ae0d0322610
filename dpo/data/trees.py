"""Conversation trees (OpenAssistant's): each message that has several ranked answers gives pairs.

    prompt: {text, role, replies: [{text, role, rank, replies: [...]}, ...]}

The prompt of a pair is the way from the root to the message. Rank 0 is the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo.data.formats import Candidate, RowError, split_field, text_field
from dpo.data.messages import Messages, read_message
from dpo.data.shapes import MAX_ANSWERS, as_number, scored_pairs

Node = Mapping[str, Any]


def is_tree(row: Mapping[str, Any]) -> bool:
    """Whether a row is a tree of messages."""
    prompt = row.get("prompt")
    return isinstance(prompt, Mapping) and isinstance(prompt.get("replies"), list)


def tree(row: Mapping[str, Any]) -> list[Candidate]:
    """Pairs of all messages of a tree.

    Raises:
        RowError: no message has two answers with unlike ranks, or one cannot be read.
    """
    split = split_field(row)
    found: list[Candidate] = []
    for prompt, answers in _asked(row["prompt"]):
        ranked = [
            (-as_number(answer["rank"], "rank"), text_field(answer, "text"))
            for answer in answers
            if answer.get("rank") is not None
        ]
        if len({rank for rank, _ in ranked[:MAX_ANSWERS]}) > 1:
            turns = [turn._asdict() for turn in prompt]
            found += scored_pairs(turns, "prompt", ranked[:MAX_ANSWERS], split)
    if not found:
        raise RowError("one_answer", "no message of this tree has two ranked answers", "prompt")
    return found


def _asked(root: Node) -> Iterator[tuple[Messages, list[Node]]]:
    """(what was said so far, the answers) for each message of a user."""
    waiting: list[tuple[Messages, Node]] = [((), root)]
    while waiting:
        before, node = waiting.pop()
        said = read_message({"role": node.get("role"), "content": node.get("text")}, "prompt")
        so_far = (*before, said)
        replies = [reply for reply in _replies(node) if not reply.get("deleted")]
        if said.role == "user":
            yield so_far, replies
        waiting += [(so_far, reply) for reply in reversed(replies)]


def _replies(node: Node) -> list[Node]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise RowError("wrong_type", "replies must be a list of messages", "prompt")
    return replies
