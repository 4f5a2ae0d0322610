"""Trajectories of the reference implementation, step by step."""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from dpo.config.losses import AnyLoss
from dpo.config.schema import RunConfig
from dpo.data.loader import Order
from dpo.data.log_probs import PairLogProbs
from dpo.data.tokenize import Limits, load_tokenizer, tokenize_pair
from dpo.modeling.load import load_model
from dpo.modeling.scoring import score
from dpo.train.data import Examples
from dpo.train.log import MetricLog
from dpo.train.step import Objective
from dpo.train.trainer import Trainer

GOLDEN = Path(os.environ.get("DPO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
NAMES = ["sft", "dpo", "cdpo", "ipo", "reference_free"]
TOKEN_BUDGET = 2048


def read(name):
    return json.loads((GOLDEN / f"trajectory_{name}.json").read_text(encoding="utf-8"))


def tokenized(golden, *, sft):
    tokenizer = load_tokenizer(GOLDEN / "model")
    limits = Limits(golden["max_length"], golden["max_prompt_length"], golden["truncation_mode"])
    lines = (GOLDEN / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    examples = []
    for number, row in enumerate(map(json.loads, lines)):
        texts = [row["chosen"]] if sft else [row["chosen"], row["rejected"]]
        examples.append(tokenize_pair(row["prompt"], texts, tokenizer, limits, pair_id=str(number)))
    return examples


def reference_of(model, examples, indices, n_micro_batches):
    """Scored in the rows in which the policy sees them: equal models are equal to the bit."""
    size = len(indices) // n_micro_batches
    found = {}
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        scored = score(
            model, [examples[i] for i in part], dtype=torch.float32, token_budget=TOKEN_BUDGET
        )
        found.update(
            {str(i): PairLogProbs("", "", *row) for i, row in zip(part, scored, strict=True)}
        )
    return found


@contextmanager
def trainer_for(golden, folder):
    sft = golden["loss"]["name"] == "sft"
    examples = tokenized(golden, sft=sft)
    config = RunConfig(
        loss=TypeAdapter(AnyLoss).validate_python(golden["loss"]),
        optimizer=golden["optimizer"],
        lr=golden["learning_rate"],
        warmup_steps=golden["warmup_steps"],
        batch_size=golden["batch_size"],
        gradient_accumulation_steps=golden["gradient_accumulation_steps"],
        max_grad_norm=golden["max_grad_norm"],
    )
    model = load_model(GOLDEN / "model", torch.float32)
    order = Order(len(examples), config.batch_size, n_epochs=2, n_examples=None, seed=0)
    data = Examples(order, dict(enumerate(examples)), [], "golden")
    objective = Objective(model, config.loss, torch.float32, TOKEN_BUDGET)
    log = MetricLog(folder)
    trainer = Trainer(config, "sft", objective, data, None, log)
    if not sft:
        frozen = load_model(GOLDEN / "model", torch.float32)
        trainer.reference = {}
        for step in golden["steps"]:
            trainer.reference[step["step"]] = reference_of(
                frozen, examples, step["examples"], config.gradient_accumulation_steps
            )
    yield trainer, examples
    log.close()


def check_step(figures, step):
    assert figures["lr"] == pytest.approx(step["lr"], rel=1e-6)
    assert figures["grad_norm"] == pytest.approx(step["grad_norm_before_clipping"], rel=1e-3)
    for key, expected in step["metrics"].items():
        # rewards are small differences of sums of some hundred: an absolute error beside them
        near = {"rel": 1e-4, "abs": 2e-4 if key.startswith("rewards") else 1e-6}
        assert figures[key] == pytest.approx(expected, **near), (step["step"], key)


@pytest.mark.parametrize("name", NAMES)
def test_golden_trajectory(name, tmp_path):
    golden = read(name)
    with trainer_for(golden, tmp_path) as (trainer, examples):
        by_step = trainer.reference
        for step in golden["steps"]:
            if by_step is not None:
                trainer.reference = by_step[step["step"]]
            figures = trainer.train_step([examples[i] for i in step["examples"]])
            check_step(figures, step)
    state = dict(trainer.objective.model.named_parameters())
    for key, expected in golden["final_parameter_l2_norms"].items():
        # softmax does not see a key's bias: its gradient is zero up to rounding, which RMSprop
        # scales up to full steps in a random direction
        tolerance = 0.02 if key.endswith("attention.query_key_value.bias") else 1e-4
        found = float(state[key].detach().double().norm())
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=1e-6), key


def test_golden_batches_start_where_policy_and_reference_are_equal(tmp_path):
    golden = read("dpo")
    step = golden["steps"][0]
    with trainer_for(golden, tmp_path) as (trainer, examples):
        trainer.reference = trainer.reference[0]
        figures = trainer.train_step([examples[i] for i in step["examples"]])
    assert figures["rewards_train/accuracies"] == 0.0
    assert figures["rewards_train/margins"] == 0.0
    assert figures["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
