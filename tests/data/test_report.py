"""The data report: its figures by hand, its page without network or script."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo import data
from dpo.data import assemble
from dpo.data.lengths import length_figures
from dpo.data.reasons import TITLES
from dpo.data.repeats import REASONS
from dpo.data.report import _ending
from dpo.data.tokenize import Limits, tokenize_pair
from tests.data.conftest import Outcome, good_row

LIMITS = Limits(max_length=8, max_prompt_length=4, truncation_mode="keep_end")
SAMPLE = [
    # words + end mark of the longer response: 3 + 3, 6 + 6, 6 + 3, 1 + 2
    {"prompt": "a b c", "chosen": "d e", "rejected": "f"},
    {"prompt": "a b c d e f", "chosen": "g", "rejected": "h i j k l"},
    {"prompt": "a b c d e f", "chosen": "g", "rejected": "h i"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def test_lengths_in_tokens() -> None:
    """Pairs have 6, 12, 9 and 3 tokens. Over 8 a prompt is cut to 4: only 4 + 6 is still over."""
    found = length_figures(SAMPLE, count_words, LIMITS)
    assert found["truncated_prompt_share"] == 2 / 4
    assert found["truncated_response_share"] == 1 / 4
    assert found["chosen_longer_share"] == 1 / 4
    assert found["same_length_share"] == 1 / 4
    assert found["suggested_max_length"] == 32
    assert found["percentiles"]["prompt"]["100"] == 6
    assert found["percentiles"]["rejected"]["100"] == 6
    histogram = found["histograms"]["prompt"]
    assert sum(histogram["counts"]) == 4
    at = dict(zip(histogram["edges"], histogram["counts"], strict=False))
    assert (at[1], at[3], at[6]) == (1, 1, 2)


def test_truncation_is_that_of_the_tokenisation(words: Any) -> None:
    found = length_figures(SAMPLE, count_words, LIMITS)
    cut = []
    for row in SAMPLE:
        example = tokenize_pair(row["prompt"], [row["chosen"], row["rejected"]], words, LIMITS)
        prompt_cut = len(example.prompt_T) < len(row["prompt"].split())
        response_cut = any(words.eos_token_id not in ids for ids in example.responses)
        cut.append((prompt_cut, response_cut))
    assert found["truncated_prompt_share"] == sum(p for p, _ in cut) / 4
    assert found["truncated_response_share"] == sum(r for _, r in cut) / 4


@pytest.fixture
def report(ingest: Callable[..., Outcome]) -> Outcome:
    rows = [good_row(number) for number in range(30)]
    rows += [{"prompt": "<script>alert(1)</script>", "chosen": "<b>", "rejected": "x"}]
    rows += [{"prompt": "p", "chosen": "", "rejected": "<img src=x>"}]
    return ingest(rows)


def test_the_page_needs_nothing_and_runs_nothing(report: Outcome) -> None:
    page = (report.folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img" not in page
    assert not re.search(r"(src|href)\s*=", page)
    assert "33 pairs</strong> from 34 rows" in page
    assert page.count("<svg") == 3
    assert "chosen is empty." in page
    assert "A text is empty" in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("Hi?\n\nAssistant:", "Hi?"),
        ("one two " * 20 + "end?", "… " + "one two " * 13 + "end?"),
        ("\u4f60\u597d" * 100, "… " + "\u4f60\u597d" * 55),
        ("w" * 200 + " end?", "… " + "w" * 105 + " end?"),
    ],
)
def test_the_end_of_a_prompt_is_shown_with_spaces_and_without(prompt: str, shown: str) -> None:
    assert _ending(prompt) == shown


def test_texts_of_other_directions_turn_nothing_around(ingest: Callable[..., Outcome]) -> None:
    """Marks of direction end with the element that they are in."""
    hebrew = "\u202e\u05e9\u05dc\u05d5\u05dd"
    found = ingest([good_row(1) | {"prompt": hebrew}, good_row(2) | {"chosen": f"{hebrew}\a"}])
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(hebrew, page)) == len(
        re.findall(f'<(?:bdi|summary dir="auto"|pre dir="auto")>[^<]*{hebrew}', page)
    )


def test_a_faulty_text_is_quoted_without_the_space_around_it(
    ingest: Callable[..., Outcome],
) -> None:
    """Two of five rows: 40.0 %, on one line with its sign. Of a space nothing is quoted."""
    asked = "\n\nHuman: Why?\n\nAssistant:"
    rows = [{"chosen": asked, "rejected": f"{asked} No."}, {**good_row(2), "chosen": " "}]
    found = ingest([good_row(1), *rows])  # and two good ones of the fixture
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "It begins: “<bdi>Human: Why?" in page
    assert page.count("It begins") == 1
    assert "(40.0\N{NO-BREAK SPACE}%)" in page


def test_every_reason_of_the_code_has_words() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in Path(data.__path__[0]).glob("*.py"))
    used = set(re.findall(r'RowError\(\s*"([a-z_]+)"', code)) | set(REASONS)
    assert len(used) > 25
    assert used == set(TITLES)


def test_the_figures_agree_with_the_files(report: Outcome) -> None:
    figures = report.report["figures"]
    assert figures["pairs"] == figures["train_pairs"] + figures["test_pairs"] == 33
    assert figures["rows"] == sum(source["rows"] for source in figures["by_source"].values()) == 34
    assert figures["by_source"]["rows"] == {
        **{"rows": 32, "pairs": 31, "rejected": 1},
        "reasons": {"empty": 1},
    }
    assert set(report.report["sources"]) == {"rows", "good"}
    assert report.report["lengths_tokens"]["sample_pairs"] == 33
    assert len(report.report["sample"]) == 8


def test_of_large_pairs_fewer_are_measured(
    ingest: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are counted at seconds a megabyte: 250 pairs of 2 MB took more than ten minutes."""
    monkeypatch.setattr(assemble, "_SAMPLE_BYTES", 100_000)
    rows = [good_row(number) | {"chosen": f"{number} " * 5000} for number in range(30)]
    found = ingest(rows)
    n_measured = found.report["lengths_tokens"]["sample_pairs"]
    assert 1 <= n_measured <= 10
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert f"measured on a sample of {n_measured} pairs" in page
