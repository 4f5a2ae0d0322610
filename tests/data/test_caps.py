"""``max_pairs``: what a source does not use takes nothing from the others."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dpo.data import division
from tests.data.conftest import GOOD, Ingest, Outcome, good_row

BIG = [good_row(number) for number in range(40)]
SMALL = [good_row(number) for number in range(10, 20)]


@pytest.fixture
def capped(ingest_sources: Ingest, tmp_path: Path) -> Ingest:
    """Ingest of ``big`` and ``small``, with the settings of each."""

    def run(big: list[Any], small: list[Any], caps: dict[str, int]) -> Outcome:
        sources = {}
        for name, rows in (("big", big), ("small", small)):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            sources[name] = {"path": str(path), "max_pairs": caps.get(name)}
        return ingest_sources(sources, test_fraction=0.5)

    return run


def chosen(found: Outcome, source: str) -> list[str]:
    return [pair["chosen"] for pair in found.pairs if pair["dataset"] == source]


def test_pairs_that_are_not_used_outrank_none(capped: Ingest) -> None:
    found = capped(BIG, SMALL, {"big": 5})
    big, small = chosen(found, "big"), chosen(found, "small")
    assert len(big) == 5
    assert small == [row["chosen"] for row in SMALL if row["chosen"] not in big]
    assert found.reasons == ["duplicate_pair"] * (10 - len(small))
    figures = found.report["figures"]
    assert (figures["unused"], figures["rows"]) == (35, 50)


def test_two_sources_with_caps_each_get_theirs(
    capped: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks there are. Small has ten pairs; big uses at most five of them."""
    whole = capped(BIG, SMALL, {"big": 5, "small": 5})
    assert (len(chosen(whole, "big")), len(chosen(whole, "small"))) == (5, 5)
    assert len({pair["pair_id"] for pair in whole.pairs}) == 10
    monkeypatch.setattr(division, "BLOCK_BYTES", 300)
    assert capped(BIG, SMALL, {"big": 5, "small": 5}).pairs == whole.pairs


def test_a_held_out_prompt_that_is_not_used_may_be_trained_on(capped: Ingest) -> None:
    held_out = [{**row, "split": "test"} for row in BIG]
    small = [{**row, "chosen": "another", "split": "train"} for row in SMALL]
    found = capped(held_out, small, {"big": 5})
    used = {pair["prompt"] for pair in found.pairs if pair["dataset"] == "big"}
    trained = [pair["prompt"] for pair in found.pairs if pair["dataset"] == "small"]
    assert trained == [row["prompt"] for row in SMALL if row["prompt"] not in used]


def test_repeats_within_a_capped_source_stay_out(capped: Ingest) -> None:
    """A repeat of a pair that is not used does not come in its place."""
    found = capped([*BIG, *BIG], [good_row(99)], {"big": 5})
    assert len(chosen(found, "big")) == 5
    assert found.reasons == ["duplicate_pair"] * 40
    assert found.report["figures"]["unused"] == 35


def test_contradictions_count_used_or_not(capped: Ingest) -> None:
    opposite = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in SMALL]
    found = capped(BIG, [*opposite, good_row(99)], {"big": 5})
    assert chosen(found, "small") == ["yes 99"]


@pytest.mark.parametrize("seed", range(10, 20))
def test_no_cap_is_exceeded_and_no_pair_is_lost_to_an_unused_one(
    ingest_sources: Ingest, tmp_path: Path, seed: int
) -> None:
    """Three sources of few prompts and answers, so that nearly all rows collide."""
    dice = random.Random(seed)
    sources: dict[str, dict[str, Any]] = {}
    rows = {name: [random_row(dice) for _ in range(12)] for name in "abc"}
    for name, items in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in items))
        sources[name] = {"path": str(path), "max_pairs": dice.choice([None, 1, 2, 5])}
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    found = ingest_sources({**sources, "good": {"path": str(tmp_path / "good.jsonl")}})
    used = {key(pair): pair["split"] for pair in found.pairs}
    assert len(used) == len(found.pairs)
    held_out = {pair["prompt"] for pair in found.pairs if pair["split"] == "test"}
    assert not held_out & {pair["prompt"] for pair in found.pairs if pair["split"] == "train"}
    for name, source in sources.items():
        if source["max_pairs"]:
            assert len(chosen(found, name)) <= source["max_pairs"]
            continue
        lost = [row for row in rows[name] if key(row) not in used]
        assert all(row["split"] == "train" and row["prompt"] in held_out for row in lost)


def random_row(dice: random.Random) -> dict[str, Any]:
    """No two contradict each other."""
    return {
        "prompt": f"p{dice.randrange(4)}",
        "chosen": f"c{dice.randrange(3)}",
        "rejected": f"r{dice.randrange(2)}",
        "split": dice.choice(["train", "train", "test"]),
    }


def key(pair: dict[str, Any]) -> tuple[str, ...]:
    return pair["prompt"], pair["chosen"], pair["rejected"]
