"""One row of data: each reason to reject it, and what passes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from dpo.data.formats import Candidate, RowError
from dpo.data.text_tokenizer import load_text_tokenizer
from dpo.data.tokenize import Limits
from dpo.data.validate import Validator
from tests.data.conftest import Ingest, good_row, row

LONG = "word " * 600


@pytest.mark.parametrize(
    ("bad", "reason", "field"),
    [
        (row("p", "c", "r") | {"chosen": None}, "missing_field", "chosen"),
        (row("p", "c", "r") | {"rejected": ["x"]}, "wrong_type", "rejected"),
        (row("p", " \n", "r"), "empty", "chosen"),
        (row("", "c", "r"), "empty", "prompt"),
        (row("p", "c", "r", sft_target=" "), "empty", "sft_target"),
        (row("p", "same", " same "), "chosen_equals_rejected", "rejected"),
        (row("p", " [deleted]", "r"), "placeholder", "chosen"),
        (row("p", "c", "nan\n"), "placeholder", "rejected"),
        (row("#NAME?", "c", "r"), "placeholder", "prompt"),
        (row("p", "bell \a", "r"), "control_character", "chosen"),
        (row("p", "c", "delete \x7f"), "control_character", "rejected"),
        (row("p", "c", "a\0b"), "control_character", "rejected"),
        (row("p", "It\u0092s", "r"), "control_character", "chosen"),
        (row("p", "c", "wait \u0097"), "control_character", "rejected"),
        (row("p", " \u200b\ufeff", "r"), "empty", "chosen"),
        (row("\u2060", "c", "r"), "empty", "prompt"),
        (row("lost \N{REPLACEMENT CHARACTER}", "c", "r"), "broken_encoding", "prompt"),
        (row("p", "end<|endoftext|>", "r"), "eos_in_text", "chosen"),
        (row("p", LONG + "a", LONG + "b"), "identical_after_truncation", "rejected"),
        (row(LONG, "\n\u3000" * 900 + "a", "b"), "empty_after_truncation", "chosen"),
        (row(LONG, "a", "\n\u200b" * 900 + "b"), "empty_after_truncation", "rejected"),
        (row("q" + "\n\u3000" * 900, "a", "b"), "empty_after_truncation", "prompt"),
        ({"note": "nothing"}, "unknown_format", ""),
        (["list"], "wrong_type", ""),
    ],
)
def test_each_reason(ingest: Ingest, bad: Any, reason: str, field: str) -> None:
    found = ingest([good_row(1), bad])
    (line,) = found.quarantine
    assert (line["reason"], line["field"], line["line"]) == (reason, field, 2)
    assert line["source"] == "rows"
    assert line["file"] == "rows: rows.jsonl"
    assert line["row"] == bad
    assert line["advice"]
    assert [pair["prompt"] for pair in found.pairs] == ["Question 1?"]
    assert found.report["figures"]["by_source"]["rows"]["reasons"] == {reason: 1}


def test_a_line_that_is_not_json_is_rejected_with_its_text(ingest: Ingest, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(good_row(1)) + '\n{"prompt": "p", \n')
    found = ingest([good_row(2)], {"path": str(path)})
    assert [(line["reason"], line["line"]) for line in found.quarantine] == [("unreadable", 2)]
    assert found.quarantine[0]["row"] == found.quarantine[0]["value"] == '{"prompt": "p", '
    (shown,) = found.report["examples"]["unreadable"]
    assert shown.endswith("""(unreadable: '{"prompt": "p", ')""")


def test_ordinary_characters_pass(ingest: Ingest) -> None:
    odd = row("tab\t, line\r\n, ünï, 漢字 \U0001f600", "\u2028 c", " r <| endoftext |>")
    found = ingest([odd])
    assert found.quarantine == []
    assert [found.pairs[0][name] for name in odd] == list(odd.values())


def test_truncation_keeps_pairs_that_differ_within_the_limit(ingest: Ingest) -> None:
    """The first difference stands inside the 256 tokens that are kept."""
    found = ingest([row("p", "a " + LONG, "b " + LONG)])
    assert found.quarantine == []


def test_white_space_that_is_not_all_that_is_left_passes(ingest: Ingest) -> None:
    blank = "\n\u3000" * 60
    rows = [
        *(row(LONG, f"{blank}a", "b"), row(f"p{blank}", f"{blank}a", f"{blank}b")),
        # no more than fits into the limits together
        row("p", "\n\u3000" * 80 + "a", "b"),
    ]
    assert len(ingest(rows).pairs) == 3


def test_a_prompt_may_keep_its_start(ingest: Ingest) -> None:
    rows = [row("\n\u3000" * 900 + "q", "a", "b"), row("q" + "\n\u3000" * 900, "c", "d")]
    found = ingest(rows, truncation_mode="keep_start")
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [
        (1, "empty_after_truncation")
    ]


def test_white_space_at_the_end_of_a_prompt_is_read_forwards(tmp_path: Path) -> None:
    """Backwards it has no space before a line end, which are one token here."""
    names = ["<end>", "Q", "a", "b", " ", "\n", "\t", " \n"]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [(" ", "\n")]))
    backend.add_special_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    limits = Limits(20, 10, "keep_end")
    validator = Validator(load_text_tokenizer(tmp_path), limits, "raw", 0.1, "rows")
    with pytest.raises(RowError) as caught:
        validator.check(Candidate("Q" + " \n\t" * 40, "a", "b"))
    assert (caught.value.reason, caught.value.field) == ("empty_after_truncation", "prompt")
    # it knows no such letter, and has no token for what it does not know
    with pytest.raises(RowError) as caught:
        validator.check(Candidate("é", "a" * 12 + "b", "a" * 13))
    assert (caught.value.reason, caught.value.field) == ("empty_after_truncation", "prompt")


def test_the_cut_is_counted_in_bytes_not_characters(ingest: Ingest) -> None:
    """100 letters of 3 bytes that are tokens of one byte each: 256 tokens end before the 100th."""
    same = "\ua000" * 99
    found = ingest([row("p", same + "\ua001" * 400, same + "\ua002" * 400)])
    assert found.reasons == ["identical_after_truncation"]


def test_long_prompts_can_be_refused(ingest: Ingest) -> None:
    """The tiny tokenizer has no token longer than its text: 40 characters are 40 tokens at most."""
    rows = [row("x y z " * 30, "a", "b"), row("short", "a", "b")]
    found = ingest(rows, {"max_prompt_tokens": 20})
    assert [(line["reason"], line["field"]) for line in found.quarantine] == [
        ("prompt_too_long", "prompt")
    ]
    assert [pair["prompt"] for pair in found.pairs] == ["short"]
    assert ingest(rows).quarantine == []
