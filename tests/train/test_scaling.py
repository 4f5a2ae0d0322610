"""float16: losses are scaled, a step that overflows is done again, the scale is in checkpoints."""

import json
import math

import pytest
import torch

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.loader import LoaderState
from dpo.errors import NonFiniteError
from dpo.train.parallel import Ranks
from dpo.train.position import Position
from dpo.train.scaling import LossScale
from dpo.train.stage import run_train
from dpo.train.trainer import Trainer
from tests.train.conftest import SETTINGS

RUN = [*SETTINGS, "n_examples=24", "checkpoint_seconds=0", "lr=1e-5"]


class Scaled:
    """Stands in for the objective: one gradient, times the scale, in float16's range."""

    dtype = torch.float16

    def __init__(self, weight, gradient):
        self.weight, self.gradient, self.scales = weight, gradient, []

    def accumulate(self, examples, reference, n_micro_batches, loss_scale):
        self.scales.append(loss_scale)
        value = self.gradient * loss_scale
        value = value if value <= 65504 else math.inf
        self.weight.grad = torch.full_like(self.weight, value)
        return {"loss/train": torch.tensor([0.5])}


def gradients(gradient, scale, dtype=torch.float16):
    weight = torch.nn.Parameter(torch.zeros(1))
    objective = Scaled(weight, gradient)
    objective.dtype = dtype
    trainer = Trainer.__new__(Trainer)
    trainer.stage, objective.ranks = "preference", Ranks()
    trainer.objective, trainer.parameters, trainer.reference = objective, [weight], None
    trainer.config = restrict(compose(["max_grad_norm=1e9"]).config, "preference")
    trainer.optimizer = torch.optim.SGD([weight])
    trainer.position = Position(loss_scale=LossScale(scale))
    _, norm = trainer._gradients([object()], 1)
    return trainer, objective, norm


def test_a_step_that_overflows_is_done_again_with_half_the_scale():
    """20 x 8192 and 20 x 4096 exceed 65504, 20 x 2048 does not: two repetitions."""
    trainer, objective, norm = gradients(20.0, 8192.0)
    assert objective.scales == [8192, 4096, 2048]
    assert trainer.position.loss_scale.value == 2048
    assert norm == 20.0
    assert trainer.parameters[0].grad.item() == 20.0


def test_a_gradient_that_is_too_large_by_itself_ends_the_repetitions():
    _, objective, norm = gradients(math.inf, 4.0)
    assert objective.scales == [4, 2, 1]
    assert norm == math.inf  # check_finite names the pairs


def test_other_types_are_not_scaled():
    _, objective, norm = gradients(3.0, 65536.0, torch.bfloat16)
    assert objective.scales == [1.0]
    assert norm == 3.0


def test_the_scale_grows_after_2000_good_steps():
    scale = LossScale(1024.0)
    for _ in range(1999):
        scale.went_well()
    assert (scale.value, scale.good_steps) == (1024.0, 1999)
    scale.went_well()
    assert (scale.value, scale.good_steps) == (2048.0, 0)


def test_a_position_without_a_scale_is_read():
    old = {"steps": 3, "loader": {"epoch": 0, "position": 8, "examples": 8}}
    assert Position.of(dict(old)).loss_scale == LossScale()
    new = Position.of({**old, "loss_scale": {"value": 8.0, "good_steps": 5}})
    assert new.loss_scale == LossScale(8.0, 5)
    assert new.loader == LoaderState(0, 8, 8)


def config_of(*more):
    return restrict(compose([*RUN, "loss=sft", *more]).config, "sft")


@pytest.mark.long
def test_float16_follows_float32_and_resumes_to_the_bit(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_PROCESSES", "2")
    paths = prepared.paths(sft=True)
    half = ("trainer=FSDPTrainer", "model.fsdp_policy_mp=float16")
    run_train(config_of("trainer=FSDPTrainer"), tmp_path / "full", **paths)
    run_train(config_of(*half), tmp_path / "half", **paths)

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [line["loss/train"] for line in map(json.loads, lines) if "loss/train" in line]

    assert losses("half") == pytest.approx(losses("full"), rel=2e-2)
    kept = tmp_path / "kept"
    again = (*half, "checkpoint_every=8")
    run_train(config_of(*again), tmp_path / "first", checkpoints=kept, **paths)
    position = json.loads((kept / "step-2/position.json").read_text())
    assert position["loss_scale"]["good_steps"] == 2
    run_train(config_of(*again), tmp_path / "again", checkpoints=kept, **paths)
    whole = (tmp_path / "half/model.safetensors").read_bytes()
    assert (tmp_path / "again/model.safetensors").read_bytes() == whole


def test_the_error_of_a_lost_step_names_pairs():
    from dpo.train.step import check_finite

    class Pair:
        pair_id = "p1"

    with pytest.raises(NonFiniteError, match="gradient is not finite") as error:
        check_finite({"loss/train": torch.tensor([0.5])}, math.inf, [Pair()])
    assert "p1" in str(error.value)
