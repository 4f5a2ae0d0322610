"""Conversation trees, as OpenAssistant's export has them."""

from typing import Any

import pytest

from tests.data.test_formats import parse, reason, texts


def said(text: str, *replies: dict[str, Any], role: str = "assistant", **more: Any) -> dict:
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **more}


def asked(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return said(text, *replies, role="prompter", **more)


def tree(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}


ONE = "\n\nHuman: Hi?\n\nAssistant:"
TWO = f"{ONE} a\n\nHuman: More?\n\nAssistant:"


def test_each_message_with_ranked_answers_gives_pairs() -> None:
    more = asked("More?", said("x", rank=1), said("y", rank=0), said("not ranked"))
    row = tree(asked("Hi?", said("a", more, rank=2), said("b", rank=0), said("c", rank=1)))
    assert texts(row) == [
        (ONE, " b", " a"),
        (ONE, " c", " a"),
        (ONE, " b", " c"),
        (TWO, " y", " x"),
    ]
    assert [pair.sft_target for pair in parse(row)] == [" b", " b", " b", " y"]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        (asked("Hi?", said("a", rank=0)), "one_answer"),
        (asked("Hi?", said("a", rank=0), said("b", rank=1, deleted=True)), "one_answer"),
        (asked("Hi?", said("a"), said("b")), "one_answer"),
        (asked("Hi?", said("a", rank=0), said("b", rank=0)), "one_answer"),
        (asked("Hi?", said("a", rank="best"), said("b", rank=1)), "wrong_type"),
        (asked("Hi?", said(None, rank=0), said("b", rank=1)), "missing_field"),
        (asked("Hi?", said("a", role="judge")), "unknown_role"),
        (asked("Hi?", said("a") | {"replies": "b"}), "wrong_type"),
        (said("a", said("b", rank=0), said("c", rank=1)), "one_answer"),
    ],
)
def test_trees_without_a_pair_have_their_reason(root: dict[str, Any], expected: str) -> None:
    assert reason(tree(root)) == expected
