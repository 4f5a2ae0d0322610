"""Whole columns at once give what one row after the other gives: pairs, places and reasons."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.config.places import builtin
from dpo.config.sources import SourceConfig
from dpo.data import check
from dpo.data.check import Block, Rules, check_block
from dpo.data.columns import Columns
from dpo.data.lines import pieces
from dpo.data.quarantine import Place
from dpo.data.spill import KEYS, REJECTED, SPILL_SCHEMA, read_pairs
from dpo.data.text_columns import Cleanness
from dpo.data.tokenize import Limits
from dpo.data.validate import INVISIBLE
from tests.data.conftest import Outcome, good_row

TOKENIZER = builtin("builtin:tiny")
assert TOKENIZER is not None
RULES = Rules(TOKENIZER, Limits(512, 256, "keep_end"), "raw", 0.2)


def outcome(path: Path, folder: Path, source: dict[str, Any], split: str | None) -> Any:
    config = SourceConfig(**source)
    place = Place("rows", "rows.jsonl", split)
    tally = check_block(Block(config, 0, place, path, folder, 0, path.stat().st_size), RULES)
    table = pa.Table.from_batches(read_pairs(folder), schema=SPILL_SCHEMA)
    rejected = folder / REJECTED
    return (
        table.to_pylist(),
        (folder / KEYS).read_bytes(),
        rejected.read_bytes() if rejected.exists() else b"",
        (tally.rows, tally.lines, tally.pairs, tally.reasons),
    )


def both(data: bytes, source: dict[str, Any], split: str | None = None) -> tuple[Any, Any]:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        path = Path(name, "rows.jsonl")
        path.write_bytes(data)
        patch.setattr(check, "_FEW_LINES", 0)
        fast = outcome(path, Path(name, "fast"), source, split)
        patch.setattr(Columns, "for_source", lambda *_: None)
        return fast, outcome(path, Path(name, "slow"), source, split)


TEXT = st.one_of(
    st.sampled_from(
        [
            *("", " ", "\n", "\u3000", "a", "b", " a", "a ", "yes", "no", "x" * 300),
            *("Left", "Right"),
            *(
                "<|endoftext|>",
                "caf\u00e9",
                "lost \ufffd",
                "tab\there",
                "bell\a",
                "del\x7f",
                "nul\0",
                "It\u0092s",
                "\u0085",
                "\u00a0\u00a3",
                "\u200b",
                " \ufeff\u00ad\n",
                "\u3000\u2060\u180e",
                *(
                    "yes\u200b",
                    "caf e",
                    "cafe\u0301",
                    "a  b",
                    "a\u00a0b",
                    "a\nb",
                    "x" * 300 + "\u00ad",
                ),
                "a\u200d",
                "\u200da",
                " " * 70 + "\u200b",
                "\u3042 \u200b",
            ),
            *(" nan\n", "[deleted]", "\u3000#NAME?" + " " * 16, "#N/A" + " " * 21, "nana"),
            *("\r\n", '"quoted" \\ back', "}\n{", "\u2028", "\U0001f600"),
            *("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b", "\n\nAssistant:"),
            *('[{"role": "user", "content": "q"}]', "[{'role': 'user', 'content': 'q'}]"),
            *('{"role": "assistant", "content": "b"}', '[{"from": "gpt", "value": "b"}', "[{}]"),
            *(
                "\n\nHuman: \n\nAssistant:",
                "Human:\u3000\n\n\nAssistant:",
                "Human: q\n\nAssistant: c",
            ),
            "Human:" + " " * 70 + "\n\nAssistant:",
            *("\n\u3000" * 300 + "a", "q" + " \u200b" * 200),
            *("\n\nHuman: q\n\nAssistant:", "\n\nHuman: z\n\nAssistant: c\n\nAssistant: d"),
        ]
    ),
    st.text(max_size=12),
)
VALUE = st.one_of(TEXT, st.none(), st.integers(), st.floats(allow_nan=True), st.booleans())
ROW = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries({"chosen": TEXT, "rejected": TEXT}),
    st.fixed_dictionaries(
        {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT},
        optional={
            "split": st.sampled_from(
                ["train", "test", "validation", "dev", "Training", "none", None]
            ),
            "sft_target": st.none() | TEXT,
            "score": VALUE,
            "messages": VALUE,
            "reason": st.none() | TEXT,
            "Prompt": VALUE,
            "Split": st.sampled_from(["train", "test", None]),
            "System ": VALUE,
            "SYSTEM": VALUE,
            "Chosen": VALUE,
            "chosen_response": VALUE,
            "answer": st.sampled_from(["accept", "reject", "ignore", "a", None]),
            "Messages": VALUE,
            "system": VALUE,
            "history": VALUE,
            "images": VALUE,
            "tools": VALUE,
            # texts that chosen and rejected may have
            "a": VALUE,
            "b": VALUE,
            "answer_a": VALUE,
            "answer_b": VALUE,
            "text_1": VALUE,
            "text_2": VALUE,
        },
    ),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "id"]), VALUE),
)
LINE = st.one_of(
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")),
    st.sampled_from(
        [
            *(b"", b" ", b"[]", b"null", b'{"prompt": "a"', b'"a": 1}', b"{}", b"{}{}", b"\xff"),
            b'{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}',
            b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}',
        ]
    ),
)
GOOD = [json.dumps(good_row(number)).encode() for number in range(30)]


@given(
    st.lists(LINE, max_size=6),
    st.sampled_from([GOOD, []]),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from(["auto", "pairs", "hh", "novalto"]),
    st.sampled_from(["auto", "hash", "train", "test"]),
    st.sampled_from([None, "train", "test"]),
    st.sampled_from([None, 3]),
)
@settings(deadline=None, max_examples=150)
def test_the_two_ways_agree(
    lines: list[bytes],
    around: list[bytes],
    end: bytes,
    form: str,
    mode: str,
    split: str | None,
    limit: int | None,
) -> None:
    source = {"format": form, "split": mode, "max_prompt_tokens": limit, "path": "rows.jsonl"}
    fast, slow = both(end.join([*around, *lines, *around, b""]), source, split)
    assert fast == slow


def test_real_pairs_go_the_fast_way(ingest: Callable[..., Outcome]) -> None:
    """Guards the other tests of this file: they would pass if nothing ever went this way."""
    dialogue = "\n\nHuman: q {}\n\nAssistant:"
    for rows in (
        [good_row(number) for number in range(40)],
        [{**good_row(number), "score": number / 3, "id": str(number)} for number in range(40)],
        [
            {"chosen": dialogue.format(n) + " a", "rejected": dialogue.format(n) + " b"}
            for n in range(40)
        ],
    ):
        rows[7]["chosen"] = " "
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        block = Block(
            SourceConfig(path="x"), 0, Place("rows", "x", None), Path("x"), Path("out"), 0, 1
        )
        columns = Columns.for_source("auto", check.validator_of(block, RULES), None)
        assert columns is not None
        (piece,) = pieces([data])
        sound = columns.of_lines(piece)
        assert sound is not None
        assert sound.flagged == [7]


def test_invisible_characters_are_found_in_columns() -> None:
    cleanness = Cleanness([])
    assert cleanness.of(pa.array([], pa.string())).tolist() == []
    for char in map(chr, [*range(0x20, 0x7F), *range(0xA0, 0x3100), 0xFEFF, 0xFF21]):
        texts = ["", "yes", f" {char}\n", None, f"{char}", f"{char}\u200b", f"a{char}", "no"]
        seen = not INVISIBLE.fullmatch(char)
        clean = cleanness.of(pa.array(texts)).tolist()
        assert clean == [False, True, seen, True, seen, seen, True, True], repr(char)


def test_nesting_that_is_deeper_than_a_stack_is_a_reason(ingest: Callable[..., Outcome]) -> None:
    deep = '{"prompt": "p", "chosen": "c", "rejected": "r", "x": ' + '{"a":' * 100_000 + "1"
    fast, slow = both("".join([*map(str, [json.dumps(good_row(1)), "\n", deep])]).encode(), {})
    assert fast == slow
    assert fast[3][3] == {"unreadable": 1}


@given(st.lists(st.text("<|abc\u00e9>", max_size=8), max_size=5))
@settings(deadline=None)
def test_words_are_found_in_columns(texts: list[str]) -> None:
    """A tokenizer's special tokens, which may have any letters and any number of them."""
    words = ["<|a|>", "<|ab", "<b>", "\u00e9a", "c"]
    sound = [bool(text) and not any(word in text for word in words) for text in texts]
    cleanness = Cleanness(words)
    assert [cleanness.of(pa.array([text])).tolist() for text in texts] == [[one] for one in sound]
    # of several texts, what stands across their borders may be named as well
    together = cleanness.of(pa.array(texts, pa.string())).tolist()
    assert not any(clean and not one for clean, one in zip(together, sound, strict=True))
