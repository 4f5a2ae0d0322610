"""What counts as a verdict, and on which answer; rows as annotation tools and arenas write them."""

from time import process_time
from typing import Any

import pytest

from dpo.data.formats import Rating, RowError
from tests.data.test_formats import parse, reason, texts

FIRST, SECOND = [("p", "a", "b")], [("p", "b", "a")]
LETTERS = {"prompt": "p", "answer_a": "a", "answer_b": "b"}
NUMBERS = {"prompt": "p", "response_1": "a", "response_2": "b"}


@pytest.mark.parametrize("model", ["llama", "koala", "vicuna", "gemma", "Alpaca"])
def test_a_verdict_may_name_a_model(model: str) -> None:
    row = {**LETTERS, "model_a": "gpt-4", "model_b": model, "winner": model.lower()}
    assert texts(row) == SECOND
    assert texts({**row, "model_a": model, "model_b": "gpt-4"}) == FIRST


def test_a_number_at_the_end_of_a_models_name_is_no_mark() -> None:
    row = {**NUMBERS, "model_1": "llama-2", "model_2": "gpt-3", "preferred": "llama-2"}
    assert texts(row) == FIRST
    assert reason({**row, "model_2": "llama-2"}) == "unknown_verdict"


@pytest.mark.parametrize(
    "value", ["derecha", "idea", "not a", "worse: b", "llama", "not answer_a", "answer_a or so"]
)
def test_a_letter_at_the_end_of_a_text_is_no_verdict(value: str) -> None:
    assert reason({**LETTERS, "winner": value}) == "unknown_verdict"


@pytest.mark.parametrize("value", [-1, -2, -2.0, "-2", "+2", 1.7, 0, 3, 10**400])
def test_numbers_that_name_no_answer_are_no_verdict(value: Any) -> None:
    assert reason({**NUMBERS, "preference": value}) == "unknown_verdict"


@pytest.mark.parametrize(
    ("row", "value"),
    [
        (LETTERS, "Answer B"),
        (LETTERS, "model_b"),
        (LETTERS, "Assistant B"),
        (LETTERS, "option-b"),
        (LETTERS, "b"),
        (NUMBERS, "Response: 2"),
        (NUMBERS, "response #2"),
        (NUMBERS, "02"),
        (NUMBERS, 2.0),
        (NUMBERS, "second"),
    ],
)
def test_marks_with_and_without_a_noun_are_verdicts(row: dict[str, Any], value: Any) -> None:
    assert texts({**row, "preference": value}) == SECOND


# --- annotation tools -----------------------------------------------------------------------------

FIELDS = {"prompt": "p", "response_1": "a", "response_2": "b"}


def argilla(**questions: Any) -> dict[str, Any]:
    """A record of version 2, each question answered by some people."""
    responses = {
        name: [{"value": value, "status": "submitted"} for value in values]
        for name, values in questions.items()
    }
    return {"id": "1", "fields": FIELDS, "responses": responses}


def label_studio(*results: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    found = [{"from_name": name, "type": kind, "value": value} for name, kind, value in results]
    data = {"prompt": "p", "answer1": "a", "answer2": "b"}
    return {"id": 1, "data": data, "annotations": [{"result": found}]}


def test_a_rating_of_each_answer_is_its_score() -> None:
    assert texts(argilla(rating_1=[5], rating_2=[2])) == FIRST
    assert texts(argilla(response_1_quality=[1, 2], response_2_quality=[4])) == SECOND
    assert texts(argilla(rank_1=[1], rank_2=[2])) == FIRST
    stars = [(f"rating{n}", "rating", {"rating": stars}) for n, stars in ((1, 5), (2, 2))]
    assert texts(label_studio(*stars)) == FIRST
    assert reason(argilla(rating_1=[3], rating_2=[3])) == "equal_scores"


def test_an_overall_score_counts_before_others() -> None:
    row = argilla(overall_1=[2], overall_2=[3], helpfulness_1=[5], helpfulness_2=[1])
    assert texts(row) == SECOND


def test_a_number_of_errors_is_no_score() -> None:
    assert reason(argilla(errors_1=[5], errors_2=[0])) == "unknown_verdict"
    assert reason(argilla(toxicity_score_1=[5], toxicity_score_2=[0])) == "unknown_verdict"
    # nor is its length: HelpSteer's axes are rated beside each other
    axes = {"verbosity_rating_1": [5], "verbosity_rating_2": [1]}
    assert texts(argilla(**axes, correctness_1=[2], correctness_2=[3])) == SECOND


def test_a_question_about_something_else_is_no_vote() -> None:
    assert texts(argilla(preference=["response_1"], difficulty=[2])) == FIRST
    assert texts(argilla(preference=["response_1"], preference_confidence=[2])) == FIRST
    assert texts(argilla(preference=["response_1"], comment=["response_2"])) == FIRST
    assert texts(argilla(preference=["response_1"], rating_1=[1], rating_2=[5])) == FIRST
    assert reason(argilla(difficulty=[2])) == "unknown_verdict"


@pytest.mark.parametrize(
    "question",
    [
        *("least_preferred", "not_preferred", "dispreferred", "non_preferred_output"),
        *("select_the_bad_one", "which_is_worse", "worstResponse", "the loser", "chooseTheBad"),
    ],
)
def test_a_question_for_the_worse_answer_is_no_vote_for_it(question: str) -> None:
    assert reason(argilla(**{question: ["response_1"]})) == "unknown_verdict"
    assert texts(argilla(**{question: ["response_1"], "preference": ["response_2"]})) == SECOND
    worse = (question, "pairwise", {"selected": "left"})
    assert reason(label_studio(worse)) == "unknown_verdict"


@pytest.mark.parametrize(
    "question",
    [
        *("closer", "closest", "which_is_closer_to_the_reference", "closest_to_preferred"),
        *("preferred_or_not", "preference_badge", "better_at_least_one", "preferred_length"),
    ],
)
def test_a_word_inside_another_says_nothing_of_the_worse_answer(question: str) -> None:
    assert texts(argilla(**{question: ["response_2"]})) == SECOND
    assert texts(label_studio((question, "pairwise", {"selected": "right"}))) == SECOND


def test_what_an_answer_has_more_of_is_no_vote() -> None:
    assert reason(argilla(more_verbose=["response_1"])) == "unknown_verdict"
    assert reason(label_studio(("complexity", "pairwise", {"selected": "left"}))) == (
        "unknown_verdict"
    )


def test_the_only_question_that_names_answers_is_a_verdict() -> None:
    assert texts(argilla(label=["response_2", "response_2"], topic=["law"])) == SECOND
    assert reason(argilla(label=["response_2"], source=["response_1"])) == "unknown_verdict"


def test_comments_and_marks_in_label_studio_are_no_votes() -> None:
    left = ("pw", "pairwise", {"selected": "left"})
    for other in (
        ("confidence", "rating", {"rating": 2}),
        ("severity", "choices", {"choices": ["error in 2"]}),
        ("why", "textarea", {"text": ["A is right", "B is not"]}),
        ("comment", "textarea", {"text": ["answer 2"]}),
        ("preferred", "number", {"number": 2}),
        ("choice", "labels", {"start": 0, "end": 2, "text": "2", "labels": ["2"]}),
        ("choice", "choices", {"choices": ["answer1", "answer2"]}),
    ):
        assert texts(label_studio(left, other)) == FIRST, other


def test_a_comment_beside_the_rating_of_one_answer_is_left_out() -> None:
    row = {
        "fields": {"prompt": "p", "response": "a"},
        "responses": {"quality": [{"value": 4}], "comment": [{"value": "fine"}]},
    }
    assert parse(row) == [Rating("p", None, "a", 4.0, field="response")]
    row["responses"]["difficulty"] = [{"value": 1}]
    assert parse(row) == [Rating("p", None, "a", 4.0, field="response")]


@pytest.mark.parametrize("result", [True, 3, "x", {"a": 1}, [None], [{"value": 1}]])
def test_results_of_another_form_are_no_verdict(result: Any) -> None:
    row = {"data": FIELDS, "annotations": [{"result": result}]}
    assert reason(row) == "not_annotated"


def test_results_that_nobody_knows_are_no_silence() -> None:
    """A ranking of Label Studio's lists: somebody has judged."""
    ranked = ("rank", "ranker", {"ranker": {"best": ["answer2", "answer1"]}})
    assert reason(label_studio(ranked)) == "unknown_verdict"
    assert texts(label_studio(("pw", "pairwise", {"selected": "left"}), ranked)) == FIRST


def test_argillas_data_sets_of_version_1() -> None:
    def row(*people: tuple[Any, str]) -> dict[str, Any]:
        said = [
            {"user_id": str(n), "value": value, "status": status}
            for n, (value, status) in enumerate(people)
        ]
        return {**FIELDS, "preference": said, "preference-suggestion": None, "external_id": "x"}

    one, two = ("response_1", "submitted"), ("response_2", "submitted")
    assert texts(row(one)) == FIRST
    assert texts(row(two, one, two)) == SECOND
    assert texts(row(one, (None, "discarded"))) == FIRST
    assert reason(row(one, two)) == "equal_scores"
    assert reason(row()) == "not_annotated"
    assert reason(row((None, "discarded"))) == "not_annotated"
    ranking = {"rank": [2, 1], "value": ["response_1", "response_2"]}
    assert texts(row((ranking, "submitted"))) == SECOND


def test_argillas_data_sets_of_version_2() -> None:
    row = {
        **FIELDS,
        **{"id": "1", "status": "completed", "preference.suggestion": "response_1"},
        "preference.responses": ["response_1", "response_2"],
        "preference.responses.users": ["u", "v"],
        "preference.responses.status": ["discarded", "submitted"],
    }
    assert texts(row) == SECOND
    assert reason({**row, "preference.responses": []}) == "not_annotated"
    rated = {"prompt": "p", "response": "a", "quality.responses": [4, 2]}
    assert parse(rated) == [Rating("p", None, "a", 3.0, field="response")]


# --- verdicts in words, in columns and in order ---------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *("[[B]]", "[B]", "(b)", "**B**", "B.", '"B"', "B is better", "B is slightly better."),
        *("Response B is much better than Response A", "B was preferred", "B wins", "I prefer B"),
        *("Right is better", "the second answer wins", "second response", "Right > left"),
        *("b is the best", "strongly prefer B", "prefers B over A", "[[B>>A]]", "B > A", "A < B"),
    ],
)
def test_verdicts_in_words(value: str) -> None:
    assert texts({**LETTERS, "preference": value}) == SECOND


@pytest.mark.parametrize("value", ["[[C]]", "[[A=B]]", "About the same", "a tie", "**Tie**"])
def test_ties_in_words(value: str) -> None:
    assert reason({**LETTERS, "verdict": value}) == "equal_scores"


@pytest.mark.parametrize(
    "value",
    [
        *("B is not better", "B is worse", "A is better, but B is safer", "B is better than C"),
        *("B is better than B", "B > B", "B > C", "A > B < A", "C", "[C]", "b is better?", ". . x"),
        *("both are fine, but A is better", "first is better than A"),
        *("alright", "right is wrong", "right is better than B", "not the left one"),
    ],
)
def test_other_words_are_no_verdict(value: str) -> None:
    assert reason({**LETTERS, "preference": value}) == "unknown_verdict"


THREE = {"prompt": "p", "response_1": "a", "response_2": "b", "response_3": "c"}
BY_PLACE = [("p", "a", "b"), ("p", "c", "a"), ("p", "c", "b")]


@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        (["response_3", "response_1", "response_2"], BY_PLACE),
        ('["Response 3", "Response 1", "Response 2"]', BY_PLACE),
        ("3 > 1 > 2", BY_PLACE),
        ("response_2 < response_1 < response_3", BY_PLACE),
        ("3 > 1 = 2", BY_PLACE[1:]),
        # numbers are the answers' ranks, in their order
        ([2, 3, 1], BY_PLACE),
        ("[2, 3, 1]", BY_PLACE),
        (["2", "3", "1"], BY_PLACE),
    ],
)
def test_rankings_of_named_answers(ranking: Any, expected: Any) -> None:
    assert texts({**THREE, "ranking": ranking}) == expected


@pytest.mark.parametrize(
    "ranking", ["3 > 1", ["response_3", "response_3", "response_1"], "3 > 2 > 2"]
)
def test_rankings_that_leave_an_answer_out_are_no_verdict(ranking: Any) -> None:
    assert reason({**THREE, "ranking": ranking}) == "unknown_verdict"


ARENA = {"prompt": '["p"]', "response_a": '["a"]', "response_b": '["b"]', "model_a": "x"}


def winner(a: Any, b: Any, tie: Any) -> dict[str, Any]:
    return {"winner_model_a": a, "winner_model_b": b, "winner_tie": tie}


def test_the_chatbot_arenas_columns() -> None:
    assert texts({**ARENA, **winner(1, 0, 0)}) == FIRST
    assert texts({**ARENA, **winner("0", "1", "0")}) == SECOND
    assert texts({**ARENA, **winner(False, True, False)}) == SECOND
    assert texts({**LETTERS, **winner(0, 1, 0)}) == SECOND
    assert reason({**ARENA, **winner(0, 0, 1)}) == "equal_scores"
    assert reason({**ARENA, **winner("?", 0, 1)}) == "wrong_type"
    lists = {"prompt": ["p"], "response_a": ["a"], "response_b": ["b"]}
    assert texts({**lists, **winner(1, 0, 0)}) == FIRST
    # each side of a longer dialogue has earlier turns of its own
    longer = {"prompt": '["p", "q"]', "response_a": '["a", "c"]', "response_b": '["b", "d"]'}
    assert reason({**longer, **winner(1, 0, 0)}) == "prompts_differ"
    assert texts({**ARENA, "response_b": '["b"', **winner(1, 0, 0)}) == [('["p"]', '["a"]', '["b"')]


def test_marks_of_answers_stand_for_their_texts() -> None:
    assert texts({**LETTERS, "chosen": "B", "rejected": "A"}) == SECOND
    assert texts({**LETTERS, "chosen": "answer a", "rejected": "answer b"}) == FIRST
    assert texts({**NUMBERS, "chosen": 2, "rejected": 1}) == SECOND
    models = {"model_a": "llama", "model_b": "gpt-4"}
    assert texts({**LETTERS, **models, "chosen": "gpt-4", "rejected": "llama"}) == SECOND
    assert texts({**LETTERS, "chosen": "B"}) == SECOND
    assert texts({**LETTERS, "chosen": "b"}) == SECOND
    assert texts({"prompt": "p", "answer_a": "a x", "answer_b": "a y", "chosen": "a y"}) == [
        ("p", "a y", "a x")
    ]
    for pair in (("A", "B"), ("Left", "Right"), ("the first one", "the second one.")):
        row = {"prompt": "p", **dict(zip(("chosen", "rejected"), pair, strict=True))}
        assert texts(row) == [("p", *pair)]
    assert reason({**NUMBERS, "chosen": 1, "rejected": 0}) == "wrong_type"
    answers = {"prompt": "p", "responses": ["a", "b"]}
    assert texts({**answers, "chosen": 1, "rejected": 0}) == SECOND
    assert texts({**answers, "chosen": 1, "rejected": 2}) == FIRST
    # who knows where the counting begins
    three = {"prompt": "p", "responses": ["a", "b", "c"]}
    assert reason({**three, "chosen": 1, "rejected": 2}) == "wrong_type"
    assert reason({**three, "chosen": 0, "rejected": 3}) == "wrong_type"
    assert reason({**three, "chosen": -1, "rejected": 3}) == "wrong_type"
    assert reason({**LETTERS, "chosen": True, "rejected": False}) == "wrong_type"


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("Both are good pets.", "Dogs."),
        ("[2, 1]", "[1, 2]"),
        ("right", "left"),
        ("B", "A"),
        ("2 is better than 1", "1 is better than 2"),
    ],
)
def test_an_answer_that_reads_like_a_verdict_is_an_answer(better: str, worse: str) -> None:
    row = {"prompt": "p", "response_a": better, "response_b": worse}
    expected = [("p", better, worse)]
    for field in ("chosen", "preferred_response", "better_response", "best_response"):
        assert texts({**row, field: better}) == expected
    assert texts({**row, "chosen": better, "rejected": worse}) == expected


def test_a_text_of_many_spaces_is_judged_at_once() -> None:
    """Milliseconds; 13 seconds where the time grows with their square."""
    text = "x" + " " * 20_000 + "y"
    start = process_time()
    assert reason({**LETTERS, "chosen": text}) == "unknown_verdict"
    assert process_time() - start < 3


def test_two_answers_without_a_verdict_say_what_is_missing() -> None:
    with pytest.raises(RowError, match="answer_a and answer_b are answers, and no field"):
        parse({**LETTERS, "label": 1})
