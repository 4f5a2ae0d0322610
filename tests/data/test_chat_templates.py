"""Chat templates by name, from a file, and what is wrong with one before any row is read."""

from pathlib import Path

import pytest

from dpo.config.compose import compose
from dpo.config.places import chat_templates
from dpo.config.stages import load_stage, stage_json
from dpo.data.parquet import read_pairs
from dpo.errors import ConfigError
from tests.data.conftest import Ingest, good_row

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]
ANSWERS = {"chosen": "Four.", "rejected": "Five."}
ROW = {"prompt": TURNS, **ANSWERS}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
            "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            "zephyr",
            "<|system|>\nBe brief.<|endoftext|>\n<|user|>\nOne?<|endoftext|>\n"
            "<|assistant|>\nTwo.<|endoftext|>\n<|user|>\nThree?<|endoftext|>\n<|assistant|>\n",
        ),
        (
            # the beginning of the text is the tiny tokenizer's <|endoftext|> as well
            "llama3",
            "<|endoftext|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nTwo.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nThree?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_named_templates(ingest: Ingest, name: str, expected: str) -> None:
    found = ingest([ROW], prompt_format="chat", chat_template=name)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in found.pairs] == [
        (expected, "Four.", "Five.")
    ]


def test_the_pairs_carry_the_template_that_was_chosen_for_them(ingest: Ingest) -> None:
    chosen = ingest([good_row(1)], prompt_format="chat", chat_template="zephyr").folder
    for split in ("train", "test"):
        template = read_pairs(chosen, split).chat_template
        assert template == chat_templates()["zephyr"].read_text(encoding="utf-8")
    assert read_pairs(ingest([good_row(1)]).folder, "train").chat_template is None


def test_every_packaged_template_is_tested_here() -> None:
    assert set(chat_templates()) == {"chatml", "llama3", "zephyr"}


def test_a_templates_marks_are_refused_in_texts(ingest: Ingest) -> None:
    rows = [good_row(1), {**good_row(2), "chosen": "yes<|im_end|>"}]
    found = ingest(rows, prompt_format="chat", chat_template="chatml")
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [
        (2, "special_token_in_text")
    ]


def test_a_template_may_have_the_headings_of_dialogues(ingest: Ingest) -> None:
    template = (
        "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}"
        "{{ m.content }}{% endfor %}{{ '\n\nAssistant:' }}"
    )
    dialogue = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"
    rows = [
        {"prompt": dialogue, "chosen": " Four.", "rejected": " Five."},
        {"prompt": TURNS[1:], "chosen": "Six.", "rejected": "Seven."},
        *[{"prompt": dialogue, "completion": f"{n}.", "score": n} for n in (8, 9)],
        {"prompt": dialogue, "chosen": " Four.\nHuman: Five?", "rejected": " Six."},
        {"prompt": "One?\nAssistant: Two.", "chosen": " Four.", "rejected": " Six."},
        {"prompt": [{"role": "user", "content": "One?\nHuman: Two?"}], **ANSWERS},
    ]
    found = ingest(rows, prompt_format="chat", chat_template=template)
    assert [pair["prompt"] for pair in found.pairs] == [dialogue] * 3
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [
        (line, "special_token_in_text") for line in (5, 6, 7)
    ]


def test_a_file_travels_with_the_settings_as_its_text(tmp_path: Path, ingest: Ingest) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}({{ m.role }}) {{ m.content }} {% endfor %}:")
    words = ["prompt_format=chat", f"chat_template={path}"]
    config = compose(words).config
    path.unlink()
    again = load_stage("ingest", stage_json(config, "ingest"))
    assert again.chat_template == config.chat_template
    found = ingest([good_row(1)], prompt_format="chat", chat_template=again.chat_template)
    assert found.pairs[0]["prompt"] == "(user) Question 1? :"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "the chat template does not work"),
        ("{{ raise_exception('not today') }}", "does not work: not today"),
        ("{{ messages.__class__.__mro__ }}", "does not work"),
        ("no-such-name", "choose one of chatml, llama3, zephyr, or a file"),
    ],
)
def test_a_broken_template_is_one_message(ingest: Ingest, template: str, message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        ingest([good_row(1)], prompt_format="chat", chat_template=template)


def test_a_template_without_chat_is_a_mistake(ingest: Ingest) -> None:
    with pytest.raises(ConfigError, match="uses no chat template"):
        ingest([good_row(1)], chat_template="chatml")


def test_without_any_template_the_choices_are_named(ingest: Ingest) -> None:
    with pytest.raises(ConfigError, match="chatml, llama3, zephyr"):
        ingest([good_row(1)], prompt_format="chat")
