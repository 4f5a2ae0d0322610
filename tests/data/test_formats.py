"""Each shape of row becomes the pairs that one writes down by hand."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.config.sources import Format, SourceConfig
from dpo.data import registry
from dpo.data.formats import Candidate, Message, Rating, RowError
from dpo.data.registry import parser_of
from dpo.data.shapes import messages
from tests.data.conftest import Outcome


def parse(row: Any, **source: Any) -> list[Candidate]:
    return parser_of(SourceConfig(**source))(row)


def texts(row: Any, **source: Any) -> list[tuple[str, str, str]]:
    return [item[:3] for item in parse(row, **source)]


def reason(row: Any, **source: Any) -> str:
    with pytest.raises(RowError) as caught:
        parse(row, **source)
    assert caught.value.advice
    return caught.value.reason


USER, BOT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function"}]}
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f"}}
SYSTEM = {"role": "system", "content": "Be brief."}
HI = "\n\nHuman: Hi?\n\nAssistant:"


def share_gpt(*messages: dict[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def test_plain_pairs() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "sft_target": "t", "split": "validation"}
    assert parse(row) == [Candidate("p", "c", "r", "t", "test")]
    assert parse({**row, "sft_target": None, "split": None}) == [Candidate("p", "c", "r")]


def test_hh_prompt_ends_with_the_last_assistant_mark() -> None:
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert texts({"chosen": f"{start} good", "rejected": f"{start} bad"}) == [
        (start, " good", " bad")
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: y", "prompts_differ"),
        ("no mark", "\n\nHuman: b\n\nAssistant: y", "no_assistant_turn"),
        ("\n\nHuman: b\n\nAssistant: y", "no mark", "no_assistant_turn"),
    ],
)
def test_hh_refuses(chosen: str, rejected: str, expected: str) -> None:
    assert reason({"chosen": chosen, "rejected": rejected}) == expected


SHP = {
    "history": "How?",
    "human_ref_A": "So.",
    "human_ref_B": "Thus.",
    "score_A": 4,
    "score_B": 2,
    "labels": 1,
}


def test_shp_takes_the_better_comment_from_a_score_ratio_on() -> None:
    prompt = "\n\nHuman: How?\n\nAssistant:"
    assert texts(SHP) == [(prompt, " So.", " Thus.")]
    swapped = {**SHP, "score_A": 2, "score_B": 5, "labels": 0}
    assert texts(swapped) == [(prompt, " Thus.", " So.")]
    # 5 / 3 = 1.67
    close = {**SHP, "score_A": 5, "score_B": 3}
    assert reason(close) == "score_ratio_too_low"
    assert len(texts(close, min_score_ratio=1.5)) == 1
    assert reason({**SHP, "labels": 2}) == "wrong_type"
    assert reason({**SHP, "score_A": "many"}) == "wrong_type"


def test_shp_from_csv_has_its_numbers_as_text() -> None:
    row = {**SHP, "score_A": "2", "score_B": "5.0", "labels": "0"}
    assert texts(row) == [("\n\nHuman: How?\n\nAssistant:", " Thus.", " So.")]
    assert reason({**row, "labels": "B"}) == "wrong_type"
    assert reason({**row, "score_A": "nan"}) == "wrong_type"


def test_answers_that_are_whole_dialogues_have_their_prompt_in_them() -> None:
    row = {"chosen": f"{HI} Yes.", "rejected": f"{HI} No.", "sft_target": f"{HI} Oh."}
    for prompt in (HI, "Hi?"):
        assert parse({"prompt": prompt, **row}) == [Candidate(HI, " Yes.", " No.", " Oh.")]
    assert reason({"prompt": "Other?", **row}) == "prompts_differ"
    once = {"prompt": "Hi?", "chosen": f"{HI} Yes.", "rejected": "No."}
    assert texts(once) == [("Hi?", f"{HI} Yes.", "No.")]


def test_openai_messages_as_prompt_with_each_kind_of_answer() -> None:
    for chosen, rejected in (
        ("Yes.", "No."),
        (BOT, NO),
        ([BOT], [NO]),
        ([USER, BOT], [USER, NO]),
    ):
        for name in ("prompt", "messages", "conversations"):
            row = {name: [USER], "chosen": chosen, "rejected": rejected}
            (found,) = parse(row)
            assert found[:3] == (HI, " Yes.", " No.")
            assert found.messages == (("user", "Hi?"),)


def test_share_gpt_messages() -> None:
    row = {
        "conversations": share_gpt(USER),
        "chosen": share_gpt(BOT)[0],
        "rejected": share_gpt(NO)[0],
    }
    assert texts(row) == [(HI, " Yes.", " No.")]


def test_trl_implicit_prompt_is_the_longest_common_beginning() -> None:
    more = [USER, BOT, {"role": "user", "content": "Sure?"}]
    (found,) = parse({"chosen": [SYSTEM, *more, BOT], "rejected": [SYSTEM, *more, NO]})
    assert found.prompt == (
        "\n\nSystem: Be brief.\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:"
    )
    assert found[1:3] == (" Yes.", " No.")
    assert [message.role for message in found.messages or ()] == [
        *("system", "user", "assistant", "user")
    ]


def test_dialogue_lists_beside_a_prompt_text() -> None:
    """UltraFeedback binarized: the prompt is also the first message of both lists."""
    row = {"prompt": "Hi?", "chosen": [USER, BOT], "rejected": [USER, NO], "score_chosen": 8.0}
    assert texts(row) == [(HI, " Yes.", " No.")]
    assert reason({**row, "prompt": "Bye?"}) == "prompts_differ"


def test_system_field_becomes_a_message() -> None:
    row = {"system": "Be brief.", "prompt": [USER], "chosen": "Yes.", "rejected": "No."}
    assert texts(row)[0][0] == "\n\nSystem: Be brief." + HI


def test_openai_preference_form() -> None:
    row = {
        "input": {"messages": [USER], "tools": []},
        "preferred_output": [BOT],
        "non_preferred_output": [NO],
    }
    assert texts(row) == [(HI, " Yes.", " No.")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER, BOT], "chosen": "a", "rejected": "b"}, "roles_out_of_order"),
        ({"prompt": [USER, USER], "chosen": "a", "rejected": "b"}, "roles_out_of_order"),
        ({"prompt": [USER, SYSTEM], "chosen": "a", "rejected": "b"}, "roles_out_of_order"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "roles_out_of_order"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [NO]}, "roles_out_of_order"),
        ({"prompt": [USER], "chosen": [BOT, USER, BOT], "rejected": [NO]}, "roles_out_of_order"),
        ({"prompt": [USER, CALL], "chosen": "a", "rejected": "b"}, "tool_message"),
        ({"prompt": [USER], "chosen": [CALL], "rejected": [NO]}, "tool_message"),
        ({"prompt": [USER], "chosen": CALL, "rejected": NO}, "tool_message"),
        ({"prompt": [USER], "chosen": OLD_CALL, "rejected": NO}, "tool_message"),
        ({"prompt": [{**USER, "role": "robot"}], "chosen": "a", "rejected": "b"}, "unknown_role"),
        ({"prompt": [{**USER, "content": None}], "chosen": "a", "rejected": "b"}, "wrong_type"),
        ({"prompt": [{"text": "x"}], "chosen": "a", "rejected": "b"}, "wrong_type"),
        ({"prompt": {"role": "user"}, "chosen": "a", "rejected": "b"}, "wrong_type"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": None}, "missing_field"),
    ],
)
def test_message_lists_refuse(row: Any, expected: str) -> None:
    assert reason(row, format="messages") == expected


def test_answers_are_compared_by_one_measure() -> None:
    """5 of 5 and 7 of 10 are on two scales, and a score says nothing beside a rank."""
    fine = {"text": "a", "fine-grained_score": 5.0, "overall_score": 9.0}
    row = {"prompt": "p", "completions": [fine, {"text": "b", "overall_score": 7.0}]}
    assert texts(row) == [("p", "a", "b")]
    row["completions"] = [{"text": "a", "rank": 1}, {"text": "b", "score": 2}]
    assert reason(row) == "missing_field"


def test_ultrafeedback_pairs_each_two_unlike_scores() -> None:
    row = {
        "instruction": "Hi?",
        "completions": [
            {"model": "a", "response": "Three", "overall_score": 3.0},
            {"model": "b", "response": "Nine", "overall_score": "9"},
            {"model": "c", "response": "Also three", "overall_score": 3.0},
        ],
    }
    found = parse(row)
    assert [item[:3] for item in found] == [(HI, " Nine", " Three"), (HI, " Nine", " Also three")]
    assert {item.sft_target for item in found} == {" Nine"}


def test_rankings_give_a_pair_for_each_two() -> None:
    row = {"prompt": "p", "responses": ["b", "a", "c"], "ranks": [2, 1, 3]}
    expected = [("p", "a", "b"), ("p", "b", "c"), ("p", "a", "c")]
    assert texts(row) == expected
    by_score = {"prompt": "p", "responses": ["b", "a", "c"], "scores": [0.5, 1, 0]}
    assert texts(by_score) == expected
    inline = {"prompt": "p", "answers": [{"text": t, "rank": r} for t, r in zip("bac", (2, 1, 3))]}  # noqa: B905
    assert texts(inline) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "responses": ["a"], "ranks": [1]}, "one_answer"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}, "equal_scores"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "wrong_type"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, "x"]}, "wrong_type"),
        ({"prompt": "p", "responses": ["a", 3], "scores": [1, 2]}, "wrong_type"),
        ({"prompt": "p", "responses": ["a", "b"]}, "missing_field"),
        ({"prompt": "p", "responses": "ab"}, "wrong_type"),
        ({"prompt": "p", "responses": ["x"] * 65, "scores": [1] * 65}, "wrong_type"),
    ],
)
def test_rankings_refuse(row: Any, expected: str) -> None:
    assert reason(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "c"}, "missing_field"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "missing_field"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "wrong_type"),
        ({"prompt": "p", "chosen": 1.5, "rejected": "r"}, "wrong_type"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "split": "dev-ish"}, "wrong_split"),
        ({"text": "x", "label": 1}, "unknown_format"),
        ({}, "unknown_format"),
        ([1, 2], "wrong_type"),
        ("text", "wrong_type"),
        (None, "wrong_type"),
    ],
)
def test_other_rows_are_refused(row: Any, expected: str) -> None:
    assert reason(row) == expected


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction", "problem", "query"])
def test_the_answer_that_is_missing_is_named(prompt: str) -> None:
    for found, missing in (("chosen", "rejected"), ("rejected", "chosen")):
        with pytest.raises(RowError, match=f"the field {missing} is missing"):
            parse({prompt: "Q?", found: "a"})


def test_a_mended_quarantine_line_is_its_row() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    line = {"reason": "empty", "advice": "...", "split": "test", "row": row}
    assert parse(line) == [Candidate("p", "c", "r", split="test")]
    text = {**line, "row": '{"prompt": "p", "chosen": "c", "rejected": "r"}'}
    assert parse(text) == parse(line)
    assert reason({**line, "row": '{"prompt": '}) == "unreadable"


anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "prompt",
                        "chosen",
                        "rejected",
                        "messages",
                        "role",
                        "content",
                        "from",
                        "value",
                    ),
                    *(
                        "responses",
                        "scores",
                        "ranks",
                        "instruction",
                        "completions",
                        "input",
                        "split",
                    ),
                    *(
                        "history",
                        "human_ref_A",
                        "human_ref_B",
                        "question",
                        "answers",
                        "row",
                        "reason",
                    ),
                    *("advice", "preferred_output", "non_preferred_output", "text", "pm_score"),
                    *("fields", "data", "annotations", "result", "values", "winner", "ranking"),
                    *("response_1", "response_2", "preference_strength", "system", "label"),
                    *("context", "trajectory", "tools", "images", "preference", "user_id"),
                    *("q.responses", "q.responses.status", "rating_1", "rating_2", "rank"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)
formats = st.sampled_from(get_args(Format))


def test_stack_exchange_pairs_by_score_with_html_as_text() -> None:
    row = {
        "qid": 1,
        "question": "<p>How do I <em>sort</em>?</p>\n\n<pre><code>a = [2,\n 1]</code></pre>",
        "answers": [
            {"text": "<p>One &lt; two</p>", "pm_score": 1},
            {"text": "<ul>\n<li>sorted(a)</li>\n<li>a.sort()</li>\n</ul>", "pm_score": 4},
            {"text": "<p>Don't<br>do it</p>", "pm_score": 0},
        ],
    }
    prompt = "\n\nHuman: How do I sort?\n\na = [2,\n 1]\n\nAssistant:"
    best, middle, worst = " - sorted(a)\n- a.sort()", " One < two", " Don't\ndo it"
    found = parse(row)
    assert [item[:3] for item in found] == [
        (prompt, best, middle),
        (prompt, middle, worst),
        (prompt, best, worst),
    ]
    assert {item.sft_target for item in found} == {best}
    assert reason({**row, "answers": row["answers"][:1]}) == "one_answer"
    assert reason({**row, "answers": "none"}) == "wrong_type"


@pytest.mark.parametrize("name", ["completion", "response"])
@pytest.mark.parametrize(
    ("given", "score"),
    [
        ({"label": True}, 1),
        ({"score": "7.5"}, 7.5),
        ({"label": "True"}, 1),
        ({"label": "false"}, 0),
    ],
)
def test_rated_answers(name: str, given: dict[str, Any], score: float) -> None:
    assert parse({"prompt": "p", name: "a", **given}) == [Rating("p", None, "a", score, field=name)]
    turns = parse({"prompt": [USER], name: [BOT], **given})
    assert turns == [Rating(HI, (Message("user", "Hi?"),), "Yes.", score, field=name)]


def test_rated_answers_refuse() -> None:
    assert reason({"prompt": "p", "completion": "a", "label": "good"}) == "wrong_type"
    assert reason({"prompt": "p", "completion": "a"}, format="rated") == "missing_field"
    assert reason({"completion": "a", "label": True}, format="rated") == "missing_field"
    assert reason({"prompt": [BOT], "completion": "a", "label": True}) == "roles_out_of_order"


def test_a_row_on_which_a_parser_fails_is_one_row(
    ingest: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(row: Any) -> list[Candidate]:
        if row["prompt"] == [USER]:
            raise TypeError("'int' object is not subscriptable")
        if row["prompt"] == [SYSTEM]:
            raise MemoryError
        return messages(row)

    monkeypatch.setattr(registry, "PARSERS", {**registry.PARSERS, "messages": fail})
    good = {"prompt": [{"role": "user", "content": "Bye?"}], "chosen": "a", "rejected": "b"}
    found = ingest([{**good, "prompt": [USER]}, good])
    assert [pair["chosen"] for pair in found.pairs] == [" a"]
    (line,) = found.quarantine
    assert (line["line"], line["reason"]) == (1, "unreadable")
    assert "TypeError: 'int' object is not subscriptable" in line["advice"]
    with pytest.raises(MemoryError):
        ingest([{**good, "prompt": [SYSTEM]}])


@given(anything, formats)
@settings(deadline=None, max_examples=400)
def test_any_row_gives_pairs_or_a_reason(row: Any, name: str) -> None:
    try:
        found = parse(row, format=name)
    except RowError:
        return
    assert found
    assert all(isinstance(item.prompt, str) for item in found)


def test_distilabels_generations_with_ratings(ingest: Callable[..., Outcome]) -> None:
    row = {"instruction": "Why?", "generations": ["So.", "No."], "ratings": [2.0, 4.0]}
    assert [(p["chosen"], p["rejected"]) for p in ingest([row]).pairs] == [(" No.", " So.")]


def test_whole_dialogues_with_a_label(ingest: Callable[..., Outcome]) -> None:
    """LLaMA-Factory's form for KTO: the last turn is judged."""
    user = {"role": "user", "content": "Why?"}
    rows = [
        {"messages": [user, {"role": "assistant", "content": text}], "label": label}
        for text, label in (("So.", False), ("No.", True))
    ]
    found = ingest(rows)
    assert [(p["chosen"], p["rejected"]) for p in found.pairs] == [(" No.", " So.")]
    assert found.pairs[0]["prompt"] == "\n\nHuman: Why?\n\nAssistant:"
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "No."}]
    (item,) = parse({"conversations": turns, "kto_tag": False})
    assert item == Rating(HI, (Message("user", "Hi?"),), "No.", 0.0, field="conversations")


def test_a_dialogue_with_one_answer_is_no_preference(ingest: Callable[..., Outcome]) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]}
    advice = ingest([row]).quarantine[0]["advice"]
    assert "a dialogue without a second answer says nothing about what is preferred" in advice
