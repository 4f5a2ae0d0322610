"""The gate: approves what learnt, refuses flipped labels, and refuses what it cannot read."""

import json

import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.parquet import read_pairs
from dpo.data.stage import run_ingest
from dpo.evaluate.gate import run_gate
from dpo.evaluate.stage import run_evaluate
from dpo.train.reference import run_reference
from dpo.train.stage import run_train

SETTINGS = [
    *("model=tiny", "max_length=96", "max_prompt_length=32", "do_first_eval=false"),
    *("do_last_eval=false", "n_epochs=2", "n_eval_examples=null", "batch_size=16"),
    *("optimizer=AdamW", "lr=1e-3", "warmup_steps=2", "lr_schedule=linear"),
    *("evaluation.n_samples=0", "gate.min_reward_accuracy=0.55"),
]


@pytest.fixture(scope="module")
def real_pairs(tmp_path_factory):
    """The packaged HH pairs with their splits written down."""
    folder = tmp_path_factory.mktemp("pairs")
    config = compose([*SETTINGS, "datasets=[hh_sample]"]).config
    run_ingest(restrict(config, "ingest"), folder / "all")
    rows = []
    for split in ("train", "test"):
        for pair in read_pairs(folder / "all", split).rows:
            texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            rows.append({**texts, "split": split})
    return rows


def flipped(rows):
    """Training labels exchanged; what is held out stays as people labelled it."""
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        if row["split"] == "train"
        else row
        for row in rows
    ]


def verdict_of(rows, folder, *more):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = compose([*SETTINGS, f"datasets=[{file}]", "loss=sft", "n_examples=16"]).config
    config = compose([*SETTINGS, f"datasets=[{file}]", *more]).config
    data, sft, scored, policy, judged = (folder / name for name in "abcde")
    run_ingest(restrict(config, "ingest"), data)
    run_train(restrict(base, "sft"), sft, pairs=data)
    run_reference(restrict(config, "reference"), scored, pairs=data, model=sft)
    run_train(restrict(config, "preference"), policy, pairs=data, base=sft, reference=scored)
    run_evaluate(
        restrict(config, "evaluate"), judged, pairs=data, sft=sft, policy=policy, reference=scored
    )
    return run_gate(restrict(config, "gate"), folder / "verdict", evaluation=judged)


@pytest.mark.long
def test_what_learnt_real_preferences_is_approved(real_pairs, tmp_path):
    assert verdict_of(real_pairs, tmp_path).approved


@pytest.mark.long
def test_the_same_run_with_flipped_labels_is_refused(real_pairs, tmp_path):
    verdict = verdict_of(flipped(real_pairs), tmp_path, "n_epochs=1")
    assert not verdict.approved
    assert verdict.rules[0].value < 0.45
