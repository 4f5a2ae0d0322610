"""What an answer answers: the question's field, its input, the system message, earlier turns."""

from collections.abc import Callable
from typing import Any

import pytest

from dpo.data.formats import Candidate, Message, Rating, RowError
from tests.data.conftest import Outcome
from tests.data.test_formats import BOT, HI, NO, SYSTEM, USER, parse, reason, texts

PAIR = {"chosen": "The answer is 5", "rejected": "The answer is 6"}
ASKED = ("\n\nHuman: What is 2+3?\n\nAssistant:", " The answer is 5", " The answer is 6")


@pytest.mark.parametrize(
    "name", ["question", "instruction", "input", "query", "context", "problem", "user_prompt"]
)
def test_names_of_the_question(name: str) -> None:
    assert texts({name: "What is 2+3?", **PAIR}) == [ASKED]


@pytest.mark.parametrize("name", ["question", "context", "problem"])
def test_the_question_of_answers_that_are_messages(name: str) -> None:
    assert texts({name: "Hi?", "chosen": [BOT], "rejected": [NO]}) == [(HI, " Yes.", " No.")]
    assert texts({name: [USER], "chosen": BOT, "rejected": NO}) == [(HI, " Yes.", " No.")]


def test_a_trajectory_is_the_prompt() -> None:
    """A row of openbmb/UltraInteract_pair."""
    turns = [{"from": "user", "value": "What is 2+3?"}]
    row = {"task": "Math_CoT", "dataset": "gsm8k", "trajectory": turns, "id": "1", **PAIR}
    assert texts(row) == [ASKED]


@pytest.mark.parametrize(
    "field",
    [
        {"riddle": "What is 2+3?"},
        {"task": "What is 2+3?"},
        {"topic": "Say which number two and three make together"},
        {"dialog": [{"role": "user", "content": "What is 2+3?"}]},
        {"system": "You are a calculator."},
    ],
)
def test_a_question_under_another_name_is_not_left_out(field: dict[str, Any]) -> None:
    with pytest.raises(RowError, match=next(iter(field))) as caught:
        parse({**field, **PAIR})
    assert caught.value.reason == "unknown_format"


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "7 a", "source": "some forum", "category": "Open QA", "model": "GPT 4 turbo"},
        {"chosen_model": "a b", "rejected-rationale": "It says six, which is more than five."},
        {"rationale": "Two and three make five. So the second answer is wrong.", "lang": "en"},
        {"created": "2024-01-01 10:00:00", "score": 3, "tags": ["a b"], "metadata": {"a": "b c"}},
        {"text": "The answer is", "note": None, "word": "sums"},
    ],
)
def test_what_says_something_of_a_pair_is_no_question(fields: dict[str, Any]) -> None:
    assert texts({**fields, **PAIR}) == [("The answer is", " 5", " 6")]


WITH_SYSTEM = "\n\nSystem: Be brief." + HI
RESULT = [(WITH_SYSTEM, " Yes.", " No.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi?", "chosen": [USER, BOT], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, NO]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, BOT], "rejected": [USER, NO]},
        {"chosen": [USER, BOT], "rejected": [USER, NO]},
        {"chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, NO]},
        {"chosen": f"{HI} Yes.", "rejected": f"{HI} No."},
        {"prompt": HI, "chosen": " Yes.", "rejected": " No."},
        {"prompt": WITH_SYSTEM, "chosen": " Yes.", "rejected": " No."},
        {"prompt": "Hi?", "response_a": "No.", "response_b": "Yes.", "winner": "b"},
        {"instruction": "Hi?", "generations": ["No.", "Yes."], "ratings": [1, 5]},
        {"prompt": "Hi?", "responses": ["No.", "Yes."], "ranks": [2, 1]},
    ],
)
def test_the_system_message_stands_before_every_kind_of_prompt(row: dict[str, Any]) -> None:
    assert texts({"system": "Be brief.", **row}) == RESULT
    assert texts({"system_prompt": "Be brief.", "system": "", **row}) == RESULT


def test_a_system_message_in_both_dialogues_is_kept() -> None:
    row = {"prompt": [USER], "chosen": [SYSTEM, USER, BOT], "rejected": [SYSTEM, USER, NO]}
    assert texts(row) == RESULT
    other = {**SYSTEM, "content": "Be long."}
    assert reason({**row, "rejected": [other, USER, NO]}) == "roles_out_of_order"
    assert reason({**row, "prompt": [other, USER]}) == "roles_out_of_order"


def test_the_system_message_of_a_rating_and_of_a_record() -> None:
    (rating,) = parse({"system": "Be brief.", "prompt": "Hi?", "completion": "Yes.", "score": 1})
    messages = (Message("system", "Be brief."), Message("user", "Hi?"))
    assert rating == Rating(WITH_SYSTEM, messages, "Yes.", 1.0)
    fields = {"system": "Be brief.", "prompt": "Hi?", "response_1": "Yes.", "response_2": "No."}
    record = {"fields": fields, "responses": {"preference": [{"value": "response_1"}]}}
    assert texts(record) == RESULT


def test_the_sft_target_of_a_text_with_a_system_message_is_an_answer() -> None:
    row = {
        "prompt": "Hi?",
        "chosen": "Yes.",
        "rejected": "No.",
        "sft_target": "Yes!",
        "system": "S",
    }
    prompt = "\n\nSystem: S" + HI
    messages = (Message("system", "S"), Message("user", "Hi?"))
    assert parse(row) == [Candidate(prompt, " Yes.", " No.", " Yes!", messages=messages)]


@pytest.mark.parametrize("system", [None, "", "  ", 3, True, [], {}])
def test_no_system_message_changes_nothing(system: Any) -> None:
    row = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
    assert texts({**row, "system": system}) == [("Hi?", "Yes.", "No.")]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("Is it Paris? Be brief, please.", False),
        ("Tell me: Be brief or be long?", False),
        ("Be brief\n\nHi?", True),
        ("### System:\nBe brief\n### User:\nHi?", True),
        ("[INST] <<SYS>>\nBe brief\n<</SYS>>\nHi? [/INST]", True),
        ("<|system|>Be brief<|user|>Hi?", True),
    ],
)
def test_a_short_system_message_stands_in_a_prompt_by_chance(prompt: str, said: bool) -> None:
    row = {"system": "Be brief", "prompt": prompt, "chosen": "a", "rejected": "b"}
    added = f"\n\nSystem: Be brief\n\nHuman: {prompt}\n\nAssistant:"
    assert texts(row) == [(prompt, "a", "b") if said else (added, " a", " b")]


@pytest.mark.parametrize(
    "prompt",
    [
        "Be brief. USER: Hi ASSISTANT:",
        "SYSTEM: Be brief. USER: Hi",
        "[INST] Be brief. Hi? [/INST]",
        "System prompt: Be brief.\nUser: Hi",
        "### Instruction: Be brief.\n### Hi",
        "\n\nHuman: Be brief. Hi?\n\nAssistant:",
        "<|im_start|>system\nBe brief.<|im_end|>\nHi",
    ],
)
def test_a_short_system_message_of_the_prompt_is_not_said_twice(prompt: str) -> None:
    row = {"system": "Be brief.", "prompt": prompt, "chosen": "a", "rejected": "b"}
    assert texts(row) == [(prompt, "a", "b")]


@pytest.mark.parametrize("prompt", ["Give me 5 words.", "At 10:5 or so?", "5.5 or 6?", "Say: 5 a."])
def test_a_digit_of_a_prompt_repeats_no_system_message(prompt: str) -> None:
    row = {"system": "5", "prompt": prompt, "chosen": "a", "rejected": "b"}
    expected = f"\n\nSystem: 5\n\nHuman: {prompt}\n\nAssistant:"
    assert texts(row) == [(expected, " a", " b")]


def test_a_short_input_is_not_left_out_for_it_stands_in_the_instruction() -> None:
    row = {"instruction": "Which is larger than 12?", "input": "1", "chosen": "a", "rejected": "b"}
    expected = "\n\nHuman: Which is larger than 12?\n\n1\n\nAssistant:"
    assert texts(row) == [(expected, " a", " b")]
    long = "Twelve is larger than one, and one is larger than none."
    row |= {"instruction": f"Sum up: {long}", "input": long}
    assert texts(row) == [(f"\n\nHuman: Sum up: {long}\n\nAssistant:", " a", " b")]


@pytest.mark.parametrize(
    "nothing", ["nan", "<NA>", "<noinput>", " ", "None", "null", "N/A", "#N/A", "[deleted]", "[]"]
)
def test_marks_of_a_missing_text_are_no_input_and_no_system_message(nothing: str) -> None:
    row = {"instruction": "Hi?", "input": nothing, "system": nothing, "chosen": "a"}
    assert texts({**row, "rejected": "b"}) == [(HI, " a", " b")]
    asked = {"question": "Hi?", "context": nothing, "history": nothing, "chosen": "a"}
    assert texts({**asked, "rejected": "b"}) == [(HI, " a", " b")]
    # of answers it is what was said
    assert texts({"prompt": "p", "chosen": "None", "rejected": "[]"}) == [("p", "None", "[]")]


def test_history_is_earlier_turns() -> None:
    """LLaMA-Factory's form."""
    row = {"instruction": "And in German?", "input": "", "chosen": "Hallo", "rejected": "Hola"}
    prompt = (
        "\n\nSystem: S\n\nHuman: In French?\n\nAssistant: Salut"
        "\n\nHuman: And in German?\n\nAssistant:"
    )
    for history in (
        [["In French?", "Salut"]],
        '[["In French?", "Salut"]]',
        [{"role": "user", "content": "In French?"}, {"role": "assistant", "content": "Salut"}],
    ):
        assert texts({**row, "system": "S", "history": history}) == [(prompt, " Hallo", " Hola")]
    text = {"prompt": "And in German?", "chosen": "Hallo", "rejected": "Hola", "system": "S"}
    assert texts({**text, "history": [["In French?", "Salut"]]})[0][0] == prompt
    assert texts({**text, "history": [], "system": None})[0][0] == "And in German?"


@pytest.mark.parametrize("history", [["a", "b"], [["a"]], [["a", None]], "Said before.", {"a": 1}])
def test_history_of_another_form_is_refused(history: Any) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "history": history}
    assert reason(row) == "wrong_type"


TRANSLATE = "\n\nHuman: Translate.\n\ngood morning\n\nAssistant:"


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "bonjour", "rejected": "salut"},
        {"output_1": "bonjour", "output_2": "salut", "preference": 1},
        {"generations": ["bonjour", "salut"], "ratings": [5, 1]},
    ],
)
def test_alpacas_input_follows_the_instruction_everywhere(answers: dict[str, Any]) -> None:
    row = {"instruction": "Translate.", "input": "good morning", **answers}
    assert texts(row) == [(TRANSLATE, " bonjour", " salut")]


def test_a_context_goes_with_its_question() -> None:
    row = {"chosen": "c", "rejected": "r"}
    prompt = "\n\nHuman: Who?\n\nAnn came.\n\nAssistant:"
    for name in ("question", "instruction", "query"):
        assert texts({name: "Who?", "context": "Ann came.", **row})[0][0] == prompt
    turns = [USER, BOT]
    (found,) = parse({"question": "Who?", "context": turns, **row})
    assert [m.content for m in found.messages or ()] == ["Hi?", "Yes.", "Who?"]
    assert reason({"question": "Who?", "context": ["Ann came."], **row}) == "wrong_type"


@pytest.mark.parametrize("value", [3, 1.5, float("nan"), ["a"], {"a": 1}])
def test_an_instruction_that_is_no_text_is_refused(value: Any) -> None:
    row = {"instruction": value, "input": "i", "chosen": "a", "rejected": "b"}
    assert reason(row) == "wrong_type"


def test_another_account_of_whole_dialogues_is_no_prompt() -> None:
    """Capybara's conversation is a list of {input, output}."""
    row = {"conversation": [{"input": "Hi?", "output": "Oh."}]}
    row |= {"chosen": [USER, BOT], "rejected": [USER, NO]}
    assert texts(row) == [(HI, " Yes.", " No.")]


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, "Oh."),
        ({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, {**BOT, "content": "Oh."}),
        ({"chosen": [USER, BOT], "rejected": [USER, NO]}, [USER, {**BOT, "content": "Oh."}]),
        ({"question": "Hi?", "chosen": "Yes.", "rejected": "No."}, "Oh."),
        ({"question": "Hi?", "chosen": "Yes.", "rejected": "No."}, f"{HI} Oh."),
        ({"chosen": f"{HI} Yes.", "rejected": f"{HI} No."}, f"{HI} Oh."),
        ({"chosen": f"{HI} Yes.", "rejected": f"{HI} No."}, " Oh."),
    ],
)
def test_a_rows_own_sft_target(
    ingest: Callable[..., Outcome], row: dict[str, Any], target: Any
) -> None:
    assert [pair.sft_target for pair in parse({**row, "sft_target": target})] == [" Oh."]
    rows = [{**row, "sft_target": target}, *({**row, "id": n} for n in range(2))]
    assert ingest(rows).pairs[0]["sft_target"] == " Oh."
    assert reason({**row, "sft_target": 5}) == "wrong_type"


@pytest.mark.parametrize("name", ["question", "problem", "query", "user_prompt"])
def test_scored_answers_to_a_question_of_any_name(name: str) -> None:
    scored = {name: "Hi?", "responses": ["Yes.", "No."], "scores": [2, 1]}
    assert texts(scored) == [(HI, " Yes.", " No.")]
    rated = {name: "Hi?", "response": "Yes.", "score": 2}
    assert [item[2:4] for item in parse(rated)] == [("Yes.", 2.0)]


def test_stack_llamas_names() -> None:
    row = {"qid": 1, "question": "Hi?", "response_j": "Yes.", "response_k": "No."}
    assert texts(row) == [(HI, " Yes.", " No.")]
