"""Fields that are no text, and texts that stand for something else."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.data.formats import Rating
from tests.data.conftest import Outcome, good_row
from tests.data.test_columns import both
from tests.data.test_formats import BOT, HI, NO, USER, parse, reason, texts

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(
    "field",
    [
        {"image": {"bytes": "x", "path": None}},
        {"images": ["a.jpg"]},
        {"video": "a.mp4"},
        {"videos": [{"path": "a"}]},
        {"audio": b"\0"},
        {"audios": '["a.wav"]'},
    ],
)
def test_rows_with_images_sound_and_films_are_refused(field: dict[str, Any]) -> None:
    assert reason({**ROW, **field}) == "not_text"
    turns = {"conversations": [USER], "chosen": BOT, "rejected": NO}
    assert reason({**turns, **field}) == "not_text"
    fields = {"prompt": "p", "response_1": "a", "response_2": "b", **field}
    record = {"fields": fields, "responses": {"preference": [{"value": "response_1"}]}}
    assert reason(record) == "not_text"


def test_messages_with_images_are_refused() -> None:
    turn = {**USER, "images": ["a.png"]}
    assert reason({"messages": [turn], "chosen": BOT, "rejected": NO}) == "not_text"
    image = {"type": "image", "text": "", "url": "a.png"}
    text = {"type": "text", "text": "What is this?"}
    for part, wanted in ((image, "wrong_type"), ({**text, "image": "a.png"}, "not_text")):
        turn = {"role": "user", "content": [part, text]}
        assert reason({"prompt": [turn], "chosen": BOT, "rejected": NO}) == wanted
    turn = {"role": "user", "content": [{**text, "image": None}]}
    assert texts({"prompt": [turn], "chosen": "a", "rejected": "b"}) == [
        ("\n\nHuman: What is this?\n\nAssistant:", " a", " b")
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_an_answer_whose_reasoning_stands_apart_is_refused(name: str) -> None:
    thought = {**BOT, name: "They said hi."}
    assert reason({"prompt": [USER], "chosen": thought, "rejected": NO}) == "reasoning_apart"
    whole = {"chosen": [USER, BOT], "rejected": [USER, {**NO, name: "They said hi."}]}
    assert reason(whole) == "reasoning_apart"
    rated = {"prompt": [USER], "completion": [thought], "label": True}
    assert reason(rated) == "reasoning_apart"
    # of earlier turns templates leave it out, and so do we
    prompt = [USER, thought, USER]
    row = {"prompt": prompt, "chosen": {**BOT, name: None}, "rejected": NO}
    assert texts(row) == [
        ("\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Hi?\n\nAssistant:", " Yes.", " No.")
    ]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_ranked_answers_is_refused_too(name: str) -> None:
    listed = [{"content": "a", "score": 1, name: "They said hi."}, {"content": "b", "score": 2}]
    assert reason({"prompt": "p", "completions": listed}) == "reasoning_apart"
    said = [{**BOT, name: "They said hi."}, NO]
    assert reason({"prompt": "p", "responses": said, "scores": [2, 1]}) == "reasoning_apart"
    said = [{**BOT, "images": ["a.png"]}, NO]
    assert reason({"prompt": "p", "responses": said, "scores": [2, 1]}) == "not_text"


@pytest.mark.parametrize("nothing", [{"effort": None}, [], "", "null", float("nan"), {}])
def test_reasoning_that_says_nothing_changes_nothing(nothing: Any) -> None:
    answer = {**BOT, "reasoning": nothing}
    assert texts({"prompt": [USER], "chosen": answer, "rejected": NO}) == [(HI, " Yes.", " No.")]
    ranked = {"prompt": "p", "responses": [answer, NO], "scores": [2, 1]}
    assert texts(ranked) == [("p", "Yes.", "No.")]


def test_rows_with_tools_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    assert reason({**ROW, "tools": tools}) == "tool_message"
    assert reason({**ROW, "tools": json.dumps(tools)}) == "tool_message"
    output = {"preferred_output": [BOT], "non_preferred_output": [NO]}
    row = {"input": {"messages": [USER], "tools": tools}, **output}
    assert reason(row) == "tool_message"


@pytest.mark.parametrize("nothing", [None, "", "[]", "null", [], {}, False, [None], float("nan")])
def test_empty_fields_of_images_and_tools_change_nothing(nothing: Any) -> None:
    row = {**ROW, "images": nothing, "tools": nothing, "image": {"bytes": nothing}}
    assert texts(row) == [("p", "c", "r")]


DIALOGUES = {"chosen": [USER, BOT], "rejected": [USER, NO]}


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()
    }


@pytest.mark.parametrize(
    "row",
    [
        DIALOGUES,
        {"prompt": "Hi?", **DIALOGUES},
        {"prompt": [USER], "chosen": "Yes.", "rejected": "No."},
        {"prompt": [USER], "chosen": [BOT], "rejected": [NO]},
        {"prompt": [USER], "chosen": BOT, "rejected": NO},
    ],
)
def test_lists_of_messages_kept_as_json_are_opened(row: dict[str, Any]) -> None:
    assert texts(as_json(row)) == texts(row) == [(HI, " Yes.", " No.")]


def test_lists_of_messages_in_csv(ingest: Callable[..., Outcome], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["chosen", "rejected"])
        writer.writeheader()
        writer.writerow(as_json(DIALOGUES))
        # what pandas writes
        writer.writerow({key: str(value) for key, value in DIALOGUES.items()})
    found = ingest([], {"path": str(path)})
    assert [(p["prompt"], p["chosen"]) for p in found.pairs] == [(HI, " Yes.")]
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [(3, "list_as_text")]


def test_a_list_that_is_cut_short_is_refused() -> None:
    row = as_json(DIALOGUES)
    assert reason({**row, "chosen": row["chosen"][:-5]}) == "list_as_text"


@pytest.mark.parametrize(
    "answers",
    [
        ('[{"role": "user", "content": "Hi?"}]', "I cannot write JSON."),
        ('{"value": 3}', '{"value": 4}'),
        ("{'value': 3}", "{'value': 4}"),
        ('[{"name": "a"}]', '[{"name": "b"}]'),
        ('["a"]', '["b"]'),
    ],
)
def test_answers_in_json_stay_texts(answers: tuple[str, str]) -> None:
    row = {"prompt": "Write JSON.", "chosen": answers[0], "rejected": answers[1]}
    assert texts(row) == [("Write JSON.", *answers)]


@pytest.mark.parametrize("dialogue", [json.dumps([USER]), str([USER])])
def test_a_prompt_that_begins_with_a_list_and_goes_on_stays_a_text(dialogue: str) -> None:
    prompt = f"{dialogue}\nSum this up."
    assert texts({**ROW, "prompt": prompt}) == [(prompt, "c", "r")]


def test_names_of_other_fields_give_way_to_their_texts() -> None:
    row = {"prompt": "p", "response_1": "a", "response_2": "b"}
    assert texts({**row, "chosen": "response_1", "rejected": "response_2"}) == [("p", "a", "b")]
    assert texts({**row, "chosen": "response_2", "rejected": "response_1"}) == [("p", "b", "a")]
    assert texts({**ROW, "chosen": "prompt", "rejected": "split"}) == [("p", "prompt", "split")]
    assert texts({**ROW, "c": 1, "r": 2}) == [("p", "c", "r")]


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "system": "Be brief."},
        {**ROW, "system_prompt": "Be brief."},
        {**ROW, "history": "Before."},
        {**ROW, "images": "a.jpg"},
        {**ROW, "tools": '[{"name": "f"}]'},
        {**ROW, "c": "text of c", "r": "text of r"},
        {**ROW, "response_a": "a", "response_b": "b", "chosen": "B", "rejected": "A"},
        as_json(DIALOGUES),
        {**ROW, **as_json(DIALOGUES)},
        {**ROW, "prompt": json.dumps([USER])},
        {**ROW, "prompt": str([USER])},
    ],
)
def test_whole_columns_leave_such_rows_to_the_parser(row: dict[str, Any]) -> None:
    """One row among others that go the fast way, with the same fields."""
    others = [{**dict.fromkeys(row), **good_row(number)} for number in range(30)]
    data = "".join(json.dumps(item) + "\n" for item in [*others, row, *others[:9]]).encode()
    fast, slow = both(data, {})
    assert fast == slow


@pytest.mark.parametrize("word", ["reject", "ignore"])
def test_an_example_that_prodigys_annotator_refused_is_left_out(word: str) -> None:
    assert reason({**ROW, "answer": word}) == "not_accepted"
    assert reason({**ROW, "Answer": word}) == "not_accepted"
    assert texts({**ROW, "answer": "accept"}) == [("p", "c", "r")]
    chosen = {"prompt": "p", "response_1": "a", "response_2": "b", "choice": "response_2"}
    assert reason({**chosen, "answer": word}) == "not_accepted"
    assert texts({**chosen, "answer": "accept"}) == [("p", "b", "a")]
    # hashes are Prodigy's own
    rated = {"prompt": "p", "answer": word, "label": True}
    assert reason({**rated, "_task_hash": 5, "response": "a"}) == "not_accepted"
    # the word is what was answered
    assert parse(rated, format="rated") == [Rating("p", None, word, 1.0, field="answer")]
    assert texts({**ROW, "chosen": word, "answer": word}) == [("p", word, "r")]
    lines = [{**good_row(number), "answer": "accept"} for number in range(40)]
    lines[7]["answer"] = word
    fast, slow = both("".join(json.dumps(line) + "\n" for line in lines).encode(), {})
    assert fast == slow
    assert fast[-1][-1] == {"not_accepted": 1}
