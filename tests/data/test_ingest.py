"""Rows in, Parquet and quarantine out: repeats, splits, caps and the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.data import check
from dpo.data.repeats import near_hash, near_hashes
from dpo.data.schema import pair_id, prompt_digest, split_of
from dpo.data.stage import run_ingest
from dpo.errors import DataError
from tests.data.conftest import GOOD, Ingest, good_row, read_outcome, row

# --- rows beside each other -----------------------------------------------------------------------


def test_a_duplicate_names_the_first(ingest: Ingest) -> None:
    found = ingest([good_row(1), good_row(2), good_row(1)])
    (line,) = found.quarantine
    assert (line["reason"], line["line"]) == ("duplicate_pair", 3)
    assert "rows: rows.jsonl, line 1" in line["advice"]
    assert len(found.pairs) == 2


def test_a_prompt_with_other_responses_is_no_duplicate(ingest: Ingest) -> None:
    found = ingest([row("p", "a", "b"), row("p", "a", "c"), row("p", "b", "c")])
    assert (found.quarantine, len(found.pairs)) == ([], 3)


def test_both_sides_of_a_contradiction_go(ingest: Ingest) -> None:
    found = ingest([row("p", "a", "b"), good_row(1), row("p", "b", "a"), row("p", "a", "b")])
    assert [(line["reason"], line["line"]) for line in found.quarantine] == [
        ("contradictory_pair", 1),
        ("contradictory_pair", 3),
        ("contradictory_pair", 4),
    ]
    assert "line 3" in found.quarantine[0]["advice"]
    assert len(found.pairs) == 1


def test_a_prompt_in_both_splits_stays_in_test(ingest: Ingest) -> None:
    found = ingest(
        [
            row("p", "a", "b", split="train"),
            row("q", "a", "b", split="train"),
            row("p", "c", "d", split="test"),
            row("p", "e", "f", split="train"),
        ]
    )
    assert [(line["reason"], line["line"]) for line in found.quarantine] == [
        ("prompt_in_test", 1),
        ("prompt_in_test", 4),
    ]
    assert [(pair["prompt"], pair["split"]) for pair in found.pairs] == [
        ("q", "train"),
        ("p", "test"),
    ]


def test_repeats_are_found_across_sources(ingest_sources: Ingest, tmp_path: Path) -> None:
    for name, rows in (("a", [*GOOD, good_row(1)]), ("b", [good_row(1), good_row(2)])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    found = ingest_sources({name: {"path": str(tmp_path / f"{name}.json")} for name in "ab"})
    (line,) = found.quarantine
    assert (line["source"], line["reason"]) == ("b", "duplicate_pair")
    assert "a: a.json" in line["advice"]


def test_a_sound_pair_of_a_row_is_kept_when_another_is_not(ingest: Ingest) -> None:
    ranked = {"prompt": "p", "responses": ["a", "", "c"], "scores": [3, 2, 1]}
    found = ingest([ranked])
    assert [(pair["chosen"], pair["rejected"]) for pair in found.pairs] == [("a", "c")]
    assert [(line["reason"], line["row"]) for line in found.quarantine] == [("empty", ranked)]


# --- splits, caps ---------------------------------------------------------------------------------


def test_prompts_are_split_by_hash_and_added_data_moves_none(ingest: Ingest) -> None:
    """The first 8 bytes of sha256 over ``split NUL prompt``, as a fraction of 2**64."""
    import hashlib

    rows = [good_row(number) for number in range(40)]
    found = ingest(rows, test_fraction=0.3)
    for pair in found.pairs:
        digest = hashlib.sha256(b"split\0" + pair["prompt"].encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        assert pair["split"] == ("test" if share < 0.3 else "train")
    assert {pair["split"] for pair in found.pairs} == {"train", "test"}
    before = {pair["pair_id"]: pair["split"] for pair in found.pairs}
    more = ingest([good_row(100), *rows], test_fraction=0.3)
    assert before.items() <= {pair["pair_id"]: pair["split"] for pair in more.pairs}.items()


def test_a_file_states_its_split(ingest_sources: Ingest, tmp_path: Path) -> None:
    for name, number in (("train-0.jsonl", 1), ("validation.jsonl", 2)):
        (tmp_path / name).write_text(json.dumps(good_row(number)) + "\n")
    found = ingest_sources({"mine": {"path": str(tmp_path / "*.jsonl")}})
    assert [(pair["prompt"][9], pair["split"]) for pair in found.pairs] == [
        ("1", "train"),
        ("2", "test"),
    ]


def test_split_settings(ingest: Ingest) -> None:
    rows = [good_row(number, "test") for number in range(30)]
    for setting, expected in (("auto", {"test"}), ("train", {"train"}), ("hash", None)):
        splits = {pair["split"] for pair in ingest(rows, {"split": setting}).pairs}
        assert splits == (expected or {"train", "test"})
    assert {p["split"] for p in ingest(rows, {"split": "hash", "test_fraction": 0}).pairs} == {
        "train"
    }


def test_the_reference_codes_split_of_stack_exchange(ingest: Ingest) -> None:
    """The first 1 % of 250 rows after a shuffle by the datasets library is held out."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    shuffled = datasets.Dataset.from_dict({"row": list(range(250))}).shuffle(seed=42)
    rows = [good_row(number) for number in range(250)]
    found = ingest(rows, {"split": "reference"})
    assert sorted(shuffled[:2]["row"]) == [
        number for number, pair in enumerate(found.pairs) if pair["split"] == "test"
    ]


def test_a_cap_is_a_seeded_choice_that_ignores_the_order(ingest: Ingest) -> None:
    rows = [good_row(number) for number in range(50)]
    chosen = {p["pair_id"] for p in ingest(rows, {"max_pairs": 10}).pairs}
    assert len(chosen) == 10
    found = ingest(rows[::-1], {"max_pairs": 10})
    assert {pair["pair_id"] for pair in found.pairs} == chosen
    assert found.report["figures"]["unused"] == 40
    other = {p["pair_id"] for p in ingest(rows, {"max_pairs": 10, "seed": 7}).pairs}
    assert len(other) == 10
    assert other != chosen


def test_pairs_of_one_prompt_can_be_limited(ingest: Ingest) -> None:
    rows = [row("p", f"a{number}", "b") for number in range(4)] + [row("q", "a", "b")]
    found = ingest([*rows, rows[0]], {"max_pairs_per_prompt": 2})
    assert [pair["chosen"] for pair in found.pairs] == ["a0", "a1", "a"]
    assert sorted((line["reason"], line["line"]) for line in found.quarantine) == [
        ("duplicate_pair", 6),
        ("over_prompt_limit", 3),
        ("over_prompt_limit", 4),
    ]


# --- rated answers --------------------------------------------------------------------------------


def test_rated_answers_of_a_prompt_become_pairs_wherever_they_stand(ingest: Ingest) -> None:
    rated = [
        {"prompt": "p", "completion": "bad", "label": False},
        {"prompt": "alone", "completion": "x", "label": True},
        {"prompt": "p", "completion": "good", "label": True},
        {"prompt": "p", "completion": "", "label": True},
        {"prompt": "p", "completion": "worse", "label": False},
        {"prompt": "both", "completion": "x", "label": True},
        {"prompt": "both", "completion": "y", "label": True},
    ]
    found = ingest(rated)
    assert [(p["prompt"], p["chosen"], p["rejected"], p["sft_target"]) for p in found.pairs] == [
        ("p", "good", "bad", "good"),
        ("p", "good", "worse", "good"),
    ]
    assert sorted((line["reason"], line["line"]) for line in found.quarantine) == [
        ("empty", 4),
        ("equal_scores", 6),
        ("equal_scores", 7),
        ("one_answer", 2),
    ]
    (empty,) = (line for line in found.quarantine if line["reason"] == "empty")
    assert empty["field"] == "completion"
    assert found.report["figures"]["by_source"]["rows"]["rows"] == 7


def test_a_prompt_whose_rated_answers_are_in_both_splits_stays_in_test(ingest: Ingest) -> None:
    rated = [
        {"prompt": "p", "completion": "a", "label": True, "split": "train"},
        {"prompt": "p", "completion": "b", "label": False, "split": "test"},
        {"prompt": "p", "completion": "c", "label": False},
    ]
    found = ingest([*rated, good_row(1)])
    splits = [pair["split"] for pair in found.pairs if pair["prompt"] == "p"]
    assert splits == ["test", "test"]


# --- golden cases, written by hand from the rules of the reference code ---------------------------


def test_shp_from_file_to_pairs(ingest: Ingest) -> None:
    """Ratios 5, 2 (kept), 1.9 (not), then 3 pairs of one post with at most 2 a prompt."""

    def post(history: str, a: int, b: int, label: int) -> dict[str, Any]:
        texts = {"human_ref_A": f"A {a}", "human_ref_B": f"B {b}"}
        return {"history": history, **texts, "score_A": a, "score_B": b, "labels": label}

    found = ingest(
        [
            post("one", 10, 2, 1),
            post("two", 3, 6, 0),
            post("three", 19, 10, 1),
            post("four", 8, 1, 1),
            post("four", 9, 2, 1),
            post("four", 12, 3, 1),
        ],
        {"format": "shp", "max_pairs_per_prompt": 2},
    )
    assert [(p["prompt"], p["chosen"], p["rejected"], p["sft_target"]) for p in found.pairs] == [
        ("\n\nHuman: one\n\nAssistant:", " A 10", " B 2", " A 10"),
        ("\n\nHuman: two\n\nAssistant:", " B 6", " A 3", " B 6"),
        ("\n\nHuman: four\n\nAssistant:", " A 8", " B 1", " A 8"),
        ("\n\nHuman: four\n\nAssistant:", " A 9", " B 2", " A 9"),
    ]
    assert [(line["line"], line["reason"]) for line in found.quarantine] == [
        (3, "score_ratio_too_low"),
        (6, "over_prompt_limit"),
    ]


def test_se_from_file_to_pairs_with_the_reference_codes_split(ingest: Ingest) -> None:
    """Of 200 rows ``datasets`` 5.2 shuffles 152 and 26 to the front with seed 42: 1 %, held out."""

    def question(number: int) -> dict[str, Any]:
        answers = [
            {"text": f"<p>low {number}</p>", "pm_score": 0},
            {"text": f"<p>high <b>{number}</b></p>", "pm_score": 3},
            {"text": f"<p>same {number}</p>", "pm_score": 3},
        ]
        return {"qid": number, "question": f"<p>Why {number}?</p>", "answers": answers}

    found = ingest(
        [question(number) for number in range(200)], {"format": "se", "split": "reference"}
    )
    first = [pair for pair in found.pairs if "Why 0?" in pair["prompt"]]
    assert [(p["prompt"], p["chosen"], p["rejected"], p["sft_target"]) for p in first] == [
        ("\n\nHuman: Why 0?\n\nAssistant:", " high 0", " low 0", " high 0"),
        ("\n\nHuman: Why 0?\n\nAssistant:", " same 0", " low 0", " high 0"),
    ]
    held_out = {pair["prompt"] for pair in found.pairs if pair["split"] == "test"}
    assert held_out == {f"\n\nHuman: Why {n}?\n\nAssistant:" for n in (152, 26)}


# --- the whole ------------------------------------------------------------------------------------


def test_too_many_bad_rows_stop_with_examples_and_keep_the_quarantine(
    ingest: Ingest, tmp_path: Path
) -> None:
    rows = [row("p", "", "r")] + [good_row(number) for number in range(3)]
    with pytest.raises(DataError, match="1 of 6 rows are unusable") as caught:
        ingest(rows, max_rejected_share=0.1)
    assert "rows: rows.jsonl, line 1: chosen is empty" in str(caught.value)
    assert not (tmp_path / "out").exists()
    kept = (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in kept] == ["empty"]
    assert len(ingest(rows, max_rejected_share=0.2).pairs) == 3
    dropped = ingest(rows, max_rejected_share=0.1, bad_rows="drop")
    assert (len(dropped.pairs), dropped.reasons) == (3, ["empty"])


def test_sound_rows_that_are_not_needed_count_as_no_fault(ingest: Ingest) -> None:
    found = ingest([good_row(1)] * 20, max_rejected_share=0.0)
    assert found.reasons == ["duplicate_pair"] * 19


def test_an_empty_source_and_an_empty_split(
    ingest: Ingest, ingest_sources: Ingest, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        ingest([])
    (tmp_path / "x.jsonl").write_text(json.dumps(good_row(1, "train")) + "\n")
    with pytest.raises(DataError, match="no pair is in the test split"):
        ingest_sources({"x": {"path": str(tmp_path / "x.jsonl")}})
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_where_no_row_gives_a_pair_the_reasons_are_told(
    ingest_sources: Ingest, tmp_path: Path
) -> None:
    bad = [{"prompt": f"p{n}", "completion": "c", "score": 1} for n in range(3)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in [*bad, row("p", "", "r")]))
    with pytest.raises(DataError, match="none of 4 rows gives a pair") as caught:
        ingest_sources({"x": {"path": str(path)}}, bad_rows="drop")
    told = str(caught.value)
    assert "rejected are 3 one_answer, 1 empty. For example:\n    x: x.jsonl, line " in told
    kept = tmp_path / "out.quarantine.jsonl"
    assert str(kept) in told
    assert len(kept.read_text().splitlines()) == 4
    kept.unlink()
    path.write_text("".join(json.dumps(item) + "\n" for item in [*bad, good_row(1, "train")]))
    with pytest.raises(DataError, match=r"no pair is in the test split \(1 pairs in all\); re"):
        ingest_sources({"x": {"path": str(path)}}, bad_rows="drop")
    assert len(kept.read_text().splitlines()) == 3


def test_a_file_that_changes_while_it_is_read_is_refused(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_check = check.check_block

    def append_and_check(block: check.Block, *arguments: Any) -> Any:
        with block.path.open("a") as file:
            file.write(json.dumps(good_row(9)) + "\n")
        return true_check(block, *arguments)

    monkeypatch.setattr(check, "check_block", append_and_check)
    with pytest.raises(DataError, match="changed while it was read"):
        ingest([good_row(1)])


def test_the_packaged_pairs(tmp_path: Path, golden_dir: Path) -> None:
    """1,900 dialogues, 6 of them broken; the golden pairs are among them unchanged."""
    config = RunConfig(
        model=ModelConfig(name_or_path="builtin:tiny"),
        sources={"hh_sample": SourceConfig(format="hh", path="builtin:hh-harmless")},
    )
    run_ingest(config, tmp_path / "out")
    found = read_outcome(tmp_path / "out")
    figures = found.report["figures"]
    assert (figures["rows"], figures["pairs"], figures["rejected"]) == (1900, 1894, 6)
    assert (figures["train_pairs"], figures["test_pairs"]) == (1499, 395)
    assert figures["reasons"] == {"empty": 4, "prompts_differ": 2}
    texts = {(p["prompt"], p["chosen"], p["rejected"]) for p in found.pairs}
    golden = [json.loads(line) for line in (golden_dir / "pairs.jsonl").read_text().splitlines()]
    assert len(golden) > 10
    assert {(g["prompt"], g["chosen"], g["rejected"]) for g in golden} <= texts


@given(*[st.text(st.characters(exclude_categories=["Cs"]))] * 3)
def test_pair_ids_are_those_of_the_first_version(prompt: str, chosen: str, rejected: str) -> None:
    """Version 1 hashed the text that Python's json module writes."""
    import hashlib

    text = json.dumps([prompt, chosen, rejected], ensure_ascii=False, separators=(",", ":"))
    assert pair_id(prompt, chosen, rejected) == hashlib.sha256(text.encode()).hexdigest()[:32]


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_larger_test_split_holds_the_smaller_one(prompt: str, one: float, two: float) -> None:
    digest = prompt_digest(prompt)
    if split_of(digest, min(one, two)) == "test":
        assert split_of(digest, max(one, two)) == "test"


def test_nearly_equal_prompts_in_both_splits_are_reported(ingest: Ingest) -> None:
    found = ingest(
        [
            row("How are you?", "a", "b", split="test"),
            row("how are  you", "a", "b", split="train"),
            row("How are you?!", "c", "d", split="train"),
            row("How are you?", "e", "f", split="train"),
            row("Who are you?", "a", "b", split="train"),
        ]
    )
    assert found.reasons == ["prompt_in_test"]
    assert found.report["figures"]["near_duplicates"] == 2
    assert found.report["near_duplicates"] == [
        "rows: rows.jsonl, line 2 is like rows: rows.jsonl, line 1",
        "rows: rows.jsonl, line 3 is like rows: rows.jsonl, line 1",
    ]
    assert "line 2 is like" in (found.folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("caf\u00e9 now?", "CAFE\u0301 now", True),
        ("zero\u200bwidth", "zerowidth\ufeff", True),
        ("\u00c9cole\u00a0?", "\u00e9cole", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("\u4f60\u597d\uff1f", "\u4f60\u3001\u597d", True),
        ("\u0645\u0631\u062d\u0628\u0627\u061f", "\u0645\u0631\u062d\u0628\u0627", True),
        ("\u00abWas?\u00bb", "\u201ewas\u201c", True),
        ("cafe", "caf\u00e9", False),
        ("\u0915\u0940", "\u0915\u093e", False),
        ("\u4f60\u597d", "\u60a8\u597d", False),
    ],
)
def test_prompts_of_any_script_may_be_nearly_equal(one: str, other: str, near: bool) -> None:
    assert (near_hash(one) == near_hash(other)) is near
    hashes = near_hashes([one.encode(), b"", other.encode()])
    assert hashes.tolist() == [
        int.from_bytes(near_hash(text), "little") for text in (one, "", other)
    ]
