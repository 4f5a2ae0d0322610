"""Dialogues through chat templates: one prompt however it is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.config.models import ModelConfig
from dpo.errors import ConfigError
from tests.data.conftest import Ingest, good_row, row


@pytest.fixture
def chat_model(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model with a chat template of square brackets that knows no system message."""
    folder = tmp_path / "chat_model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system message, please') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return folder


def test_chat_template(ingest: Ingest, chat_model: Path) -> None:
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    hh = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"
    found = ingest(
        [
            row(turns, " Four. ", "Five."),  # type: ignore[arg-type]
            {"chosen": f"{hh} Six.", "rejected": f"{hh} Seven."},
            row("Plain", "c", "r"),
            row([{"role": "system", "content": "s"}, *turns], "c", "r"),  # type: ignore[arg-type]
            row("\n\nHuman: a\n\nHuman: b", "c", "r"),
            row("text\n\nHuman: b", "c", "r"),
        ],
        model=ModelConfig(name_or_path=str(chat_model)),
        prompt_format="chat",
    )
    dialogue = "[user]One?[assistant]Two.[user]Three?[assistant]"
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in found.pairs] == [
        (dialogue, "Four.", "Five."),
        (dialogue, "Six.", "Seven."),
        ("[user]Plain[assistant]", "c", "r"),
    ]
    assert all(pair["prompt_messages"] == turns for pair in found.pairs[:2])
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [
        (4, "chat_template_refuses"),
        (5, "roles_out_of_order"),
        (6, "text_before_first_turn"),
    ]
    assert "no system message, please" in found.quarantine[0]["advice"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


WAYS: list[Callable[[str], Any]] = [
    lambda text: text,
    lambda text: f" {text}\n",
    lambda text: f"\n\nHuman:  {text}\n\nAssistant:",
    user,
    lambda text: user(f"{text} \n"),
]
"""Of writing one prompt of one turn."""


def test_a_prompt_of_a_chat_is_the_same_however_it_is_written(ingest: Ingest) -> None:
    rows = [row(way(f"Q{n}"), " yes", "no ") for n in range(12) for way in WAYS]
    found = ingest(rows, prompt_format="chat", chat_template="chatml", test_fraction=0.3)
    assert found.reasons == ["duplicate_pair"] * (12 * 4)
    assert len({pair["prompt"] for pair in found.pairs}) == 12
    # other answers: each prompt has one split
    rows = [row(way(f"Q{n}"), f"yes {k}", "no") for n in range(12) for k, way in enumerate(WAYS)]
    found = ingest(rows, prompt_format="chat", chat_template="chatml", test_fraction=0.3)
    prompts = {
        split: {pair["prompt"].replace(" \n", "") for pair in found.pairs if pair["split"] == split}
        for split in ("train", "test")
    }
    assert (found.reasons, len(found.pairs)) == ([], 12 * 5)
    assert not prompts["train"] & prompts["test"]


def test_a_chat_keeps_no_contradiction_and_no_leak(ingest: Ingest) -> None:
    rows = [row("Q1", "a", "b"), row(user("Q1"), "b", "a")]
    rows += [row("Q2", "a", "b", split="test"), row(user("Q2\n"), "c", "d", split="train")]
    found = ingest(rows, prompt_format="chat", chat_template="chatml")
    assert found.reasons == ["contradictory_pair", "contradictory_pair", "prompt_in_test"]


def test_what_a_template_leaves_out_makes_no_other_prompt(ingest: Ingest) -> None:
    template = "{% for m in messages if m.role == 'user' %}({{ m.content }}){% endfor %}"
    asked = [
        [{"role": "system", "content": said}, *user("Q")] for said in ("Be kind.", "Be brief.")
    ]
    rows = [row(asked[0], "a", "b", split="test"), row(asked[1], "c", "d", split="train")]
    found = ingest(rows, prompt_format="chat", chat_template=template)
    assert found.reasons == ["prompt_in_test"]


def test_the_split_of_a_chat_does_not_depend_on_the_template(ingest: Ingest) -> None:
    rows = [row(user(f"Q{n}"), "a", "b") for n in range(20)]
    splits = [
        [pair["split"] for pair in ingest(rows, test_fraction=0.4, **settings).pairs]
        for settings in (
            {"prompt_format": "chat", "chat_template": "chatml"},
            {"prompt_format": "chat", "chat_template": "zephyr"},
            # the text of a dialogue is that of its turns
            {},
        )
    ]
    assert splits[0] == splits[1] == splits[2]
    assert set(splits[0]) == {"train", "test"}


def test_chat_needs_a_template(ingest: Ingest) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ingest([good_row(1)], prompt_format="chat")
