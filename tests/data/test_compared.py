"""Exports of annotation tools and public sets: answers side by side, and who won."""

import json
from typing import Any

import pytest

from dpo.data.formats import Candidate, Rating, RowError
from tests.data.conftest import good_row
from tests.data.test_columns import both
from tests.data.test_formats import parse, reason, texts

PAIR = [("p", "a", "b")]
OTHER = [("p", "b", "a")]


@pytest.mark.parametrize(
    ("names", "verdict", "expected"),
    [
        (("response_1", "response_2"), {"preference_strength": -2}, PAIR),
        (("response_1", "response_2"), {"preference_strength": 1}, OTHER),
        (("response1", "response2"), {"overall_preference": 3.0}, OTHER),
        (("response_0", "response_1"), {"better_response_id": 0}, PAIR),
        (("response_0", "response_1"), {"better_response_id": 1}, OTHER),
        (("response_a", "response_b"), {"winner": "model_b"}, OTHER),
        (("answer A", "answer B"), {"winner": "A"}, PAIR),
        (("completion_a", "completion_b"), {"preferred": "completion_b"}, OTHER),
        (("response-1", "response-2"), {"choice": "response 2"}, OTHER),
        (("text1", "text2"), {"choice": "2"}, OTHER),
        (("answer1", "answer2"), {"comparison": "left"}, PAIR),
        (("answer1", "answer2"), {"comparison": "right"}, OTHER),
        (("response_1", "response_2"), {"ranking": [2, 1]}, OTHER),
    ],
)
def test_a_verdict_makes_a_pair(
    names: tuple[str, str], verdict: dict[str, Any], expected: list[tuple[str, str, str]]
) -> None:
    assert texts({"prompt": "p", names[0]: "a", names[1]: "b", **verdict}) == expected


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ({"winner": "tie"}, "equal_scores"),
        ({"winner": "tie (bothbad)"}, "equal_scores"),
        ({"preference_strength": 0}, "equal_scores"),
        ({"winner": "gpt-4"}, "unknown_verdict"),
        ({"winner": "response_3"}, "unknown_verdict"),
        ({"winner": True}, "unknown_verdict"),
        ({"preference_strength": "much"}, "wrong_type"),
    ],
)
def test_a_verdict_on_neither_has_its_reason(verdict: dict[str, Any], expected: str) -> None:
    assert reason({"prompt": "p", "response_1": "a", "response_2": "b", **verdict}) == expected


def test_scores_of_named_answers() -> None:
    """A row of openai/webgpt_comparisons, without its tokens."""
    row = {
        "question": {"dataset": "eli5", "id": "abc", "full_text": "Why is the sky blue?"},
        "quotes_0": {"title": [], "extract": []},
        "answer_0": "Paint.",
        "score_0": -0.67,
        "quotes_1": {"title": [], "extract": []},
        "answer_1": "Scattering.",
        "score_1": 0.67,
    }
    prompt = "\n\nHuman: Why is the sky blue?\n\nAssistant:"
    assert texts(row) == [(prompt, " Scattering.", " Paint.")]
    assert reason({**row, "score_0": 0.0, "score_1": 0.0}) == "equal_scores"
    assert reason({**row, "score_1": None}) == "unknown_format"
    assert reason({**row, "score_1": "good"}) == "wrong_type"


def test_a_verdict_counts_before_scores() -> None:
    row = {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "model_b"}
    assert texts({**row, "score_a": 5, "score_b": 1}) == OTHER


SUMMARIES = {
    "info": {"id": "t3_x", "post": "I fell.", "title": "Ouch", "subreddit": "AskDocs"},
    "summaries": [
        {"text": " Fell.", "policy": "sup1", "note": None},
        {"text": "A fall.", "policy": "ref", "note": None},
    ],
    "choice": 1,
    "worker": "w",
    "split": "valid2",
}


def test_comparisons_of_summaries() -> None:
    """A row of openai/summarize_from_feedback; the prompt's form is its paper's."""
    prompt = "SUBREDDIT: r/AskDocs\n\nTITLE: Ouch\n\nPOST: I fell.\n\nTL;DR:"
    assert parse(SUMMARIES) == [Candidate(prompt, " A fall.", " Fell.", split="test")]
    article = {**SUMMARIES, "info": {"article": "News.", "post": None}, "split": "train"}
    expected = Candidate("Article:\nNews.\n\nTL;DR:", " A fall.", " Fell.", split="train")
    assert parse(article) == [expected]


def test_ratings_of_summaries() -> None:
    """A row of the same set's other half, whose ratings are by several axes."""
    summary = {"text": " A fall.", "policy": "x", "axes": {"overall": 6, "accuracy": 2}}
    row = {"info": SUMMARIES["info"], "summary": summary, "worker": "w", "split": "valid1"}
    prompt = "SUBREDDIT: r/AskDocs\n\nTITLE: Ouch\n\nPOST: I fell.\n\nTL;DR:"
    assert parse(row) == [Rating(prompt, None, " A fall.", 6.0, "test", "summary")]
    assert reason({**row, "summary": {**summary, "axes": {}}}) == "not_annotated"
    assert reason({**row, "summary": "A fall."}) == "unknown_format"
    assert reason({**row, "summary": {**summary, "text": None}}) == "missing_field"
    # columns of these names in rows of another kind
    other = {"prompt": "p", "completion": "a", "label": True, "info": "i", "summary": "s"}
    assert parse(other) == [Rating("p", None, "a", 1)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choice": 2}, "unknown_verdict"),
        ({"choice": True}, "unknown_verdict"),
        ({"choice": "1"}, "unknown_verdict"),
        ({"summaries": [{"text": "a"}]}, "wrong_type"),
        ({"summaries": ["a", "b"]}, "wrong_type"),
        ({"summaries": [{"text": "a"}, {"note": "b"}]}, "missing_field"),
        ({"info": "a post"}, "wrong_type"),
        ({"info": {"title": "Ouch"}}, "missing_field"),
        ({"split": 5}, "wrong_split"),
        ({"split": "train9"}, "wrong_split"),
    ],
)
def test_broken_comparisons_of_summaries(change: dict[str, Any], expected: str) -> None:
    assert reason({**SUMMARIES, **change}) == expected


def test_a_context_of_messages_is_the_prompt() -> None:
    context = [{"role": "user", "content": "Hi?"}]
    row = {"context": context, "response1": "a", "response2": "b", "overall_preference": -1}
    assert texts(row) == [("\n\nHuman: Hi?\n\nAssistant:", " a", " b")]


def test_whole_conversations_share_their_beginning() -> None:
    said = {"role": "user", "content": "Hi?"}
    row = {
        "model_a": "x",
        "model_b": "y",
        "winner": "model_b",
        "conversation_a": [said, {"role": "assistant", "content": "a"}],
        "conversation_b": [said, {"role": "assistant", "content": "b"}],
    }
    assert texts(row) == [("\n\nHuman: Hi?\n\nAssistant:", " b", " a")]
    assert reason({**row, "winner": "tie"}) == "equal_scores"


FIELDS = {"prompt": "p", "response1": "a", "response2": "b"}


def by_person(*values: Any, status: str = "submitted") -> dict[str, Any]:
    """A record as Argilla 1 writes it."""
    responses = [
        {"user_id": str(n), "status": status, "values": {"preference": {"value": value}}}
        for n, value in enumerate(values)
    ]
    return {"fields": FIELDS, "responses": responses, "suggestions": []}


def test_argilla_records_of_version_1() -> None:
    assert texts(by_person("response2")) == OTHER
    assert texts(by_person("response1", "response2", "response1")) == PAIR
    assert reason(by_person("response1", "response2")) == "equal_scores"
    assert reason(by_person("response1", status="discarded")) == "not_annotated"
    ranking = [{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}]
    assert texts(by_person(ranking)) == OTHER


def test_argilla_records_of_version_2() -> None:
    row = {
        "id": "1",
        "status": "completed",
        "fields": {"instruction": "Hi?", "response_a": "a", "response_b": "b"},
        "responses": {"preference": [{"value": "response_b", "user_id": "u"}]},
    }
    assert texts(row) == [("\n\nHuman: Hi?\n\nAssistant:", " b", " a")]
    assert reason({**row, "responses": {}}) == "not_annotated"


def test_argilla_ratings_of_one_answer_wait_for_the_others() -> None:
    row = {
        "fields": {"prompt": "p", "response": "a"},
        "responses": {"quality": [{"value": 4}, {"value": 2}]},
    }
    assert parse(row) == [Rating("p", None, "a", 3.0, field="response")]


def test_label_studio_tasks() -> None:
    def task(value: dict[str, Any], **more: Any) -> dict[str, Any]:
        result = [{"from_name": "comparison", "type": "pairwise", "value": value}]
        data = {"prompt": "p", "answer1": "a", "answer2": "b"}
        return {"id": 1, "data": data, "annotations": [{"result": result, **more}]}

    assert texts(task({"selected": "left"})) == PAIR
    assert texts(task({"selected": "right"})) == OTHER
    assert texts(task({"choices": ["answer2"]})) == OTHER
    assert reason(task({"selected": "left"}, was_cancelled=True)) == "not_annotated"
    assert reason({**task({}), "annotations": []}) == "not_annotated"


def test_helpsteer_ratings_count_by_helpfulness() -> None:
    row = {"prompt": "p", "response": "a", "helpfulness": 3, "verbosity": 1}
    assert parse(row) == [Rating("p", None, "a", 3.0, field="response")]


def test_a_question_with_a_system_message() -> None:
    row = {"system": "Be brief.", "question": "Hi?", "chosen": "a", "rejected": "b"}
    prompt = "\n\nSystem: Be brief.\n\nHuman: Hi?\n\nAssistant:"
    assert texts(row) == [(prompt, " a", " b")]


def test_alpaca_input_follows_its_instruction() -> None:
    row = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    assert texts(row) == [("\n\nHuman: Add.\n\n1 2\n\nAssistant:", " 3", " 4")]
    assert texts({**row, "input": ""}) == [("\n\nHuman: Add.\n\nAssistant:", " 3", " 4")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        # not "The sky is bl": a tokenizer would never cut there
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("One  two", "One  three", ("One", "  two", "  three")),
        ("So it is", "So it", ("So", " it is", " it")),
    ],
)
def test_trl_implicit_prompt_of_plain_texts(
    chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    assert texts({"chosen": chosen, "rejected": rejected}) == [expected]


def test_numbers_of_answers_may_be_texts() -> None:
    row = {"prompt": "p", "responses": ["a", "b"], "chosen": "1", "rejected": "0"}
    assert texts(row) == [("p", "b", "a")]
    # the answers themselves
    assert texts({**row, "responses": ["1", "0"]}) == [("p", "1", "0")]
    sums = {"prompt": "1+1?", "chosen": "2", "rejected": "1"}
    assert texts({**sums, "responses": ["1", "3"]}) == [("1+1?", "2", "1")]
    listed = [{"text": "1"}, {"text": " 2"}]
    assert texts({**sums, "candidates": listed}) == [("1+1?", "2", "1")]
    assert texts({**sums, "response_1": "1", "response_2": "3"}) == [("1+1?", "2", "1")]
    # nobody knows which are meant
    for answers in ({"responses": ["3", "4"]}, {"response_1": "3", "response_2": "4"}):
        assert reason({**sums, **answers}) == "unknown_verdict"


def test_answers_of_two_kinds_are_not_guessed_at() -> None:
    texts_too = {"text_1": "a", "text_2": "b", "answer_1": "c", "answer_2": "d"}
    row = {"prompt": "p", **texts_too, "winner": "2"}
    assert reason(row) == "unknown_format"
    with pytest.raises(RowError, match="text_1, text_2 and answer_1, answer_2 may each be the ans"):
        parse(row)
    marks = {"chosen": "1", "rejected": "2"}
    assert reason({"prompt": "p", **texts_too, **marks}) == "unknown_format"
    assert texts({"prompt": "p", **texts_too, "chosen": "x", "rejected": "y"}) == [("p", "x", "y")]
    # a verdict may name the field in full, and empty fields are no answers
    assert texts({**row, "winner": "answer_2"}) == [("p", "d", "c")]
    for nothing in ("", "nan", None, float("nan")):
        assert texts({**row, "text_1": nothing, "text_2": nothing}) == [("p", "d", "c")]
    record = {"fields": {"prompt": "p", **texts_too}, "responses": {}}
    said = {"preference": [{"value": "answer_2"}]}
    assert texts({**record, "responses": said}) == [("p", "d", "c")]
    assert reason({**record, "responses": {"preference": [{"value": "2"}]}}) == "unknown_format"
    twice = {"response_1": "a", "Response 1": "b", "response_2": "c"}
    assert reason({"prompt": "p", **twice, "winner": "1"}) == "unknown_format"
    # one field of another kind is none of several answers
    row = {"prompt": "p", "text_1": "a", "answer_1": "c", "answer_2": "d", "winner": "answer_2"}
    assert texts(row) == [("p", "d", "c")]


def test_names_that_collide_leave_the_others_alone() -> None:
    capitals = {"Prompt": "p", "Chosen": "a", "Rejected": "b"}
    assert texts({**capitals, "Label": 1, "LABEL ": 2}) == PAIR
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    split = {"Split": "test", "Score": 1, "SCORE": 2}
    assert parse({**row, **split}) == [Candidate("p", "a", "b", split="test")]
    both = {"Split": "test", "SPLIT": None, "split": " "}
    assert parse({**row, **both}) == [Candidate("p", "a", "b", split="test")]
    system = {"System": "Be brief.", "SYSTEM": "Be brief."}
    assert texts({**row, **system}) == texts({**row, "system": "Be brief."})
    # the name itself, then other letters, then an alias
    assert texts({**row, "chosen_response": "c", "Rejected Text": "d"}) == PAIR
    assert texts({"prompt": "p", "Chosen": "a", "chosen_text": "c", "rejected": "b"}) == PAIR
    rated = {"prompt": "p", "completion": "a", "kto_tag": "news", "Label": True}
    assert parse(rated) == [Rating("p", None, "a", 1.0)]
    assert parse({"Prompt": "p", "Completion": "a", "Label": True}) == parse(rated)


@pytest.mark.parametrize(
    "fields",
    [
        {"System": "Be brief.", "SYSTEM": "Be long."},
        {"system": "Be brief.", "System ": "Be long."},
        {"split": "train", "Split": "test"},
        {"Prompt": "another"},
        {"Image": "a.png", "IMAGE": "b.png"},
    ],
)
def test_two_values_for_one_name_are_refused(fields: dict[str, str]) -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", **fields}
    with pytest.raises(RowError, match="are one name with different values"):
        parse(row)
    lines = [good_row(number) | {"id": number} for number in range(40)]
    lines[7] |= fields
    fast, slow = both("".join(json.dumps(line) + "\n" for line in lines).encode(), {})
    assert fast == slow
    assert fast[-1][-1] == {"unknown_format": 1}


def test_names_in_capitals_and_with_spaces() -> None:
    assert parse({"Prompt": "p", "Chosen ": "c", "REJECTED": "r"}) == [Candidate("p", "c", "r")]
    assert parse({"prompt": "p", "chosen_response": "c", "rejected_response": "r"}) == [
        Candidate("p", "c", "r")
    ]


def test_what_goes_with_a_pair_is_read_under_names_in_capitals_as_well() -> None:
    row = {"Prompt": "p", "Chosen": "c", "Rejected": "r", "Split": "test", "System": "s"}
    (found,) = parse(row)
    assert (found.split, found.prompt) == ("test", "\n\nSystem: s\n\nHuman: p\n\nAssistant:")
    assert parse({"prompt": "p", "chosen": "c", "rejected": "r", "split ": "test"}) == [
        Candidate("p", "c", "r", split="test")
    ]
    sheet = {"Question": "q", "Response A": "a", "Response B": "b", "Preferred": "Response B"}
    assert texts(sheet) == [("\n\nHuman: q\n\nAssistant:", " b", " a")]
    image = {"prompt": "p", "chosen": "c", "rejected": "r", "Image": "a.png"}
    assert reason(image) == "not_text"


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert texts(row) == [("\n\nHuman: Hi?\n\nAssistant:", " a", " b")]
