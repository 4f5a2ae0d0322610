"""Bugs of the reference code and of its successors: each has a test that fails on it.

| bug | test |
|---|---|
| the seed never reaches the iterator | data/test_loader: the_seed_changes_the_order |
| remainders dropped, empty slices crash | here: a_remainder_*; data/test_loader |
| an evaluation set smaller than a batch loops for ever | here: one_held_out_pair_is_enough |
| eval_every=0 divides by zero; no final evaluation | here: evaluations_before_and_after |
| saves but never resumes | train/test_resume |
| sampling under FSDP hangs | train/test_parallel |
| a float16 reference makes the first reward non-zero | here: a_reference_*; config/test_compose |
| NaN unguarded (here), hidden in logs (TRL) | here: a_loss_*, a_gradient_* |
| no export | here: the_result_opens_with_transformers |
| one node only; bfloat16 gradient reduction | train/test_parallel |
| bfloat16 rotary buffers | here: rotary_frequencies_stay_in_float32 |
| hh pairs whose prompts differ become garbage | data/test_formats: prompts_differ |
| keep_start cuts off the final "Assistant:" | here: truncation_keeps_the_end |
| getpass.getuser() fails for random user ids | here: nobody_asks_for_the_user's_name |
| the configuration of ipo is missing | config/test_compose: every_choice_composes |
| TRL: label smoothing ignored | here: label_smoothing_*; config/test_compose: options_* |
| TRL: padding-free off | modeling/test_packing |
| TRL: IPO on means only | modeling/test_losses: ipo_by_hand, ipo_on_means_by_hand |
| LLaMA-Factory: rejected attends to chosen | modeling/test_packing: a_rejected_*_sees_the_chosen |
| transformers: rejected loses its prompt | modeling/test_packing: *_loses_its_prompt |
| open-instruct: packed boundaries (first loss 6 ln 2) | here: a_wrong_boundary_*; test_packing |
| open-instruct: reference cached by the model's name | here: the_reference_follows_the_weights |
| NeMo-RL: swaps weights for the reference in every batch | here: training_never_scores |
"""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.config.compose import compose
from dpo.config.losses import DPOLoss
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.data.loader import Order
from dpo.data.log_probs import PairLogProbs, read_log_probs
from dpo.data.packing import Segment
from dpo.errors import ConfigError, InvariantError, NonFiniteError
from dpo.modeling import scoring
from dpo.modeling.load import load_model
from dpo.modeling.scoring import score
from dpo.storage.manifest import read_manifest
from dpo.train import step as step_module
from dpo.train.reference import run_reference
from dpo.train.stage import run_train
from dpo.train.step import Objective
from tests.train.conftest import SETTINGS
from tests.train.test_golden import GOLDEN, read, trainer_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def trainer(tmp_path):
    """Ready for its first step on the golden pairs, with a reference of its own."""
    with trainer_for(read("dpo"), tmp_path) as (made, examples):
        made.config = made.config.model_copy(update={"gradient_accumulation_steps": 1})
        scored = score(made.objective.model, examples, dtype=torch.float32, token_budget=2048)
        made.reference = {
            example.pair_id: PairLogProbs("", "", *row)
            for example, row in zip(examples, scored, strict=True)
        }
        yield made, examples


def gradients(objective, examples, reference, n_micro_batches):
    objective.model.zero_grad()
    figures = objective.accumulate(examples, reference, n_micro_batches)
    return figures, [p.grad.clone() for p in objective.model.parameters()]


@pytest.mark.parametrize(("n_examples", "n_micro_batches"), [(3, 2), (5, 4), (1, 4), (7, 3)])
def test_a_remainder_is_weighted_as_in_one_batch(trainer, n_examples, n_micro_batches):
    made, examples = trainer
    examples = examples[:n_examples]
    reference = [made.reference[e.pair_id] for e in examples]
    made.objective.loss = DPOLoss(beta=0.5)
    one, expected = gradients(made.objective, examples, reference, 1)
    many, found = gradients(made.objective, examples, reference, n_micro_batches)
    assert len(many["loss/train"]) == n_examples
    torch.testing.assert_close(many["loss/train"], one["loss/train"])
    for left, right in zip(found, expected, strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-7


def test_a_remainder_at_the_end_of_an_epoch_is_trained_on(trainer):
    made, examples = trainer
    made.examples = replace(
        made.examples,
        order=Order(5, made.config.batch_size, n_epochs=2, n_examples=None, seed=0),
        train=dict(enumerate(examples[:5])),
    )
    made.run()
    assert made.position.trained == 10
    assert made.position.steps == 2 * math.ceil(5 / made.config.batch_size)


def test_one_held_out_pair_is_enough(trainer):
    made, examples = trainer
    assert made.config.eval_batch_size > 1
    # scored here: another process may differ by a float32 unit of the sums, 3e-6 of the loss
    scored = score(made.objective.model, examples[:1], dtype=torch.float32, token_budget=4096)
    figures = made.objective.evaluate(examples[:1], [PairLogProbs("", "", *scored[0])])
    assert figures["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)


def test_evaluations_before_and_after_with_eval_every_0(trainer):
    made, examples = trainer
    made.config = made.config.model_copy(update={"eval_every": 0})
    order = Order(8, 4, n_epochs=1, n_examples=None, seed=0)
    made.examples = replace(made.examples, order=order, held_out=examples[:2])
    evaluated = []
    before = made.objective.evaluate
    made.objective.evaluate = lambda *args: evaluated.append(made.position.steps) or before(*args)
    made.run()
    assert evaluated == [0, 2]


@pytest.mark.parametrize("rounding", [torch.float16, torch.bfloat16])
def test_a_reference_in_another_type_stops_the_run(trainer, rounding):
    made, examples = trainer
    rounded = load_model(GOLDEN / "model", rounding).to(torch.float32)
    scored = score(rounded, examples, dtype=torch.float32, token_budget=2048)
    made.reference = {
        example.pair_id: PairLogProbs("", "", *row)
        for example, row in zip(examples, scored, strict=True)
    }
    with pytest.raises(InvariantError, match="policy and reference differ before training"):
        made.train_step(examples)


def test_a_wrong_boundary_stops_the_run(trainer, monkeypatch):
    made, examples = trainer
    pack = step_module.pack

    def wrong(*args):
        """The rejected response begins one token early."""
        rows = []
        for row in pack(*args):
            segments = tuple(
                Segment(s.start, s.prompt_end, (s.response_ends[0] - 1, s.response_ends[1]))
                for s in row.segments
            )
            rows.append(replace(row, segments=segments))
        return rows

    monkeypatch.setattr(step_module, "pack", wrong)
    with pytest.raises(InvariantError):
        made.train_step(examples[:4])


def test_a_loss_that_is_not_finite_names_the_pair_and_updates_nothing(trainer):
    made, examples = trainer
    before = [p.detach().clone() for p in made.parameters]
    bad = made.reference[examples[2].pair_id]
    made.reference[examples[2].pair_id] = replace(bad, chosen=bad.chosen * float("nan"))
    with pytest.raises(NonFiniteError, match=rf"pairs {examples[2].pair_id}\n"):
        made.train_step(examples[:4])
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))
    assert made.log.path.read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("checkpoint_every", [0, 8])
def test_an_update_that_ruins_the_weights_keeps_nothing(checkpoint_every, prepared, tmp_path):
    """A step of 1e38 times the gradient's sign: no figure before it shows anything."""
    words = ["loss=sft", "lr=1e38", "warmup_steps=0", f"checkpoint_every={checkpoint_every}"]
    words += [f"n_examples={8 + checkpoint_every}", "checkpoint_seconds=0", "do_first_eval=false"]
    config = restrict(compose([*SETTINGS, *words]).config, "sft")
    with pytest.raises(NonFiniteError, match="the weights are not finite"):
        run_train(config, tmp_path / "out", pairs=prepared.data, checkpoints=tmp_path / "kept")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("kept/step-*"))


def test_float16_weights_want_another_optimizer(prepared, tmp_path):
    config = restrict(compose([*SETTINGS, "loss=sft", "model.policy_dtype=float16"]).config, "sft")
    with pytest.raises(ConfigError, match="RMSprop cannot update float16 weights") as caught:
        run_train(config, tmp_path / "out", pairs=prepared.data)
    # each of the ways on composes
    for words in (["optimizer=AdamW"], ["model.fsdp_policy_mp=float16"]):
        compose(words)
        assert words[0] in caught.value.fix


def test_a_gradient_that_is_not_finite_names_the_batch(trainer):
    made, examples = trainer
    made.parameters[0].register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match="the gradient is not finite") as caught:
        made.train_step(examples[:2])
    assert all(example.pair_id in str(caught.value) for example in examples[:2])


def test_label_smoothing_reaches_the_loss(trainer):
    """0.7 * log(1 + e^-x) + 0.3 * log(1 + e^x) differs from log(1 + e^-x) unless x = 0."""
    made, examples = trainer
    shifted = {
        key: replace(row, chosen=row.chosen - np.float32(0.1))
        for key, row in made.reference.items()
    }
    reference = [shifted[e.pair_id] for e in examples[:2]]
    plain = Objective(made.objective.model, DPOLoss(beta=0.5), torch.float32, 2048)
    smooth = Objective(
        made.objective.model, DPOLoss(beta=0.5, label_smoothing=0.3), torch.float32, 2048
    )
    x = plain.evaluate(examples[:2], reference)["rewards_eval/margins"]
    assert x > 0.1
    difference = smooth.evaluate(examples[:2], reference)["loss/eval"]
    difference -= plain.evaluate(examples[:2], reference)["loss/eval"]
    # -log sigmoid(-x) + log sigmoid(x) = x
    assert difference == pytest.approx(0.3 * x, rel=1e-4)


def test_rotary_frequencies_stay_in_float32():
    model = load_model(builtin("builtin:tiny"), torch.bfloat16)
    names = [name for name, _ in model.named_buffers() if "inv_freq" in name]
    assert names
    assert all(model.get_buffer(name).dtype == torch.float32 for name in names)


def test_truncation_keeps_the_end():
    for name in ("hh", "shp", "se", "hh_sample"):
        assert compose([f"datasets=[{name}]"]).config.truncation_mode == "keep_end"


def test_nobody_asks_for_the_users_name():
    for package in ("dpo", "components", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            names = {getattr(n, "attr", "") for n in ast.walk(ast.parse(path.read_text("utf-8")))}
            assert not names & {"getuser", "getpwuid", "getlogin"}, path


def test_the_result_opens_with_transformers(prepared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(prepared.sft)
    assert AutoTokenizer.from_pretrained(prepared.sft).eos_token_id is not None
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_reference_follows_the_weights(prepared, tmp_path):
    """Two models of one name: another reference, another identity of what is computed from it."""
    config = restrict(compose([*SETTINGS, "n_examples=8"]).config, "reference")
    outputs = []
    for name, model in (("base", None), ("sft", prepared.sft)):
        outputs.append(tmp_path / name)
        run_reference(config, outputs[-1], pairs=prepared.data, model=model)
    first, second = (read_log_probs(output) for output in outputs)
    assert first.keys() == second.keys()
    assert any(not np.allclose(first[key].chosen, second[key].chosen) for key in first)
    hashes = [read_manifest(output).content_hash for output in outputs]
    assert hashes[0] != hashes[1]


def test_training_never_scores_the_reference(prepared, tmp_path, monkeypatch):
    """With the cached log-probabilities each pair goes through one model, once."""
    seen = []
    forward = scoring.token_log_probs
    monkeypatch.setattr(
        "dpo.modeling.sharded.token_log_probs",
        lambda model, batch, **kw: (
            seen.append((next(model.parameters()).data_ptr(), *batch.pair_ids))
            or forward(model, batch, **kw)
        ),
    )
    words = [*SETTINGS, "n_examples=16", "do_first_eval=false", "do_last_eval=false"]
    config = restrict(compose(words).config, "preference")
    run_train(config, tmp_path / "out", **prepared.paths(sft=False))
    assert len({weights for weights, *_ in seen}) == 1
    assert sum(len(ids) for _, *ids in seen) == 16
