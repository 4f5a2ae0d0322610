"""Rows side by side: the same gradients as one after the other, whoever is faster."""

import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.config.losses import DPOLoss
from dpo.data.log_probs import PairLogProbs
from dpo.data.tokenize import TokenizedExample
from dpo.modeling.kernels import apply_kernels
from dpo.modeling.lanes import balanced, lanes_for, replica_of, side_by_side, work_of
from dpo.modeling.scoring import score
from dpo.train.step import Objective
from tests.modeling.test_packing import LENGTHS, examples, tiny_config

ARCHITECTURES = ("llama", "gpt_neox", "gpt2", "opt")


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=dtype).eval()
    apply_kernels(model, "auto")
    return model


def objective_of(model, lanes, dtype=torch.float32, budget=64):
    return Objective(model, DPOLoss(beta=0.5), dtype, budget, lanes=lanes)


def step(objective, batch, reference, n_micro_batches=1):
    objective.model.zero_grad(set_to_none=True)
    figures = objective.accumulate(batch, reference, n_micro_batches)
    return figures, {name: w.grad.clone() for name, w in objective.model.named_parameters()}


@pytest.fixture
def batch():
    return examples([*LENGTHS, (3, 4, 5), (8, 8, 1), (2, 2, 2)])


@pytest.fixture
def reference(batch):
    rows = score(model_of("llama"), batch, dtype=torch.float32, token_budget=64)
    return [PairLogProbs("", "", *(part * 1.1 for part in row)) for row in rows]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_two_lanes_give_the_gradients_of_one(name, batch, reference, n_micro_batches):
    """float64: what remains is the order of sums."""
    model = model_of(name, torch.float64)
    found = [
        step(objective_of(model, lanes), batch, reference, n_micro_batches) for lanes in (1, 2)
    ]
    for (key, one), two in zip(found[0][0].items(), found[1][0].values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6, msg=key)
    for (key, one), two in zip(found[0][1].items(), found[1][1].values(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_does_not_depend_on_who_is_faster(batch, reference, dtype, monkeypatch):
    model = model_of("llama")
    objective = objective_of(model, 2, dtype, budget=40)
    _, first = step(objective, batch, reference)
    figures = Objective.figures
    for slow in (0, 1):
        seen = threading.local()

        def late(self, *given, slow=slow, seen=seen):
            if not getattr(seen, "was", False) and (self is objective) == (slow == 0):
                seen.was = time.sleep(0.05) is None
            return figures(self, *given)

        monkeypatch.setattr(Objective, "figures", late)
        _, again = step(objective, batch, reference)
        assert all(torch.equal(again[name], grad) for name, grad in first.items())


def test_lanes_follow_the_weights(batch, reference):
    """An update in place reaches a replica, and other storage makes a new one."""
    model = model_of("llama")
    objective = objective_of(model, 2)
    step(objective, batch, reference)
    replica = objective._others[0].model
    assert len({w.data_ptr() for m in (model, replica) for w in m.parameters()}) == len(
        list(model.parameters())
    )
    for change in ("in place", "other storage"):
        with torch.no_grad():
            for weight in model.parameters():
                if change == "in place":
                    weight.mul_(1.5)
                else:
                    weight.data = weight * 0.5
        figures, _ = step(objective, batch, reference)
        alone, _ = step(objective_of(model, 1), batch, reference)
        torch.testing.assert_close(figures["loss/train"], alone["loss/train"])
    assert objective._others[0].model is not replica


def test_a_replica_leaves_the_model_its_attention_and_adds_no_memory():
    model = model_of("llama")
    other = replica_of(model)
    other.config._attn_implementation = "eager"
    assert model.config._attn_implementation != "eager"
    assert all(w.requires_grad for w in other.parameters())
    tied = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    other = replica_of(tied)
    assert other.get_output_embeddings().weight is other.get_input_embeddings().weight


def test_fewer_examples_than_lanes(batch, reference):
    model = model_of("llama")
    figures, _ = step(objective_of(model, 2), batch[:1], reference[:1])
    assert len(figures["loss/train"]) == 1
    assert objective_of(model, 2).evaluate(batch[:1], reference[:1])["loss/eval"] == pytest.approx(
        float(figures["loss/train"]), rel=1e-5
    )


def test_an_error_in_a_lane_is_raised_when_all_have_ended():
    ended = []

    def work(number):
        if number == 0:
            raise ValueError("lane 0")
        time.sleep(0.2)
        ended.append(number)

    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="lane 0"):
        side_by_side(work, [0, 1])
    assert ended == [1]
    assert torch.get_num_threads() == threads


def test_lanes_share_the_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        assert side_by_side(lambda _: torch.get_num_threads(), [0, 1]) == [3, 3]
        assert torch.get_num_threads() == 6
        assert lanes_for(model_of("llama")) == 2
        torch.set_num_threads(1)
        assert lanes_for(model_of("llama")) == 1
    finally:
        torch.set_num_threads(before)


def test_balanced():
    """Largest first, 8 | 7, 6 | 5, 4 would be 12 and 18; the best is 15 and 15."""
    assert balanced([8, 7, 6, 5, 4], 2) == [[0, 1], [2, 3, 4]]
    assert balanced([5], 2) == [[0], []]
    assert balanced([], 2) == [[], []]


def test_balanced_among_many_items():
    """Thirteen: 9 | 7, 4 joins 7, 3 joins 9 (12 to 11), 1 joins 11; ones in turn."""
    assert balanced([3, 9, 4, 1, 7, *[1] * 8], 2) == [
        [0, 1, 5, 7, 9, 11],
        [2, 3, 4, 6, 8, 10, 12],
    ]
    assert balanced([3, 9, 4, 1, 7], 1) == [[0, 1, 2, 3, 4]]


def test_work_of_an_example():
    """Prompt of 3, responses of 2 and 4: 9 tokens meet the blocks, 6 of them the output layer."""
    model = model_of("gpt_neox")
    output = model.get_output_embeddings().weight.numel()
    tables = output + model.get_input_embeddings().weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - tables
    example = TokenizedExample("a", np.arange(3), (np.arange(2), np.arange(4)))
    assert work_of(model)(example) == 9 * blocks + 6 * output


def test_scores_of_two_lanes_are_those_of_one(batch, monkeypatch):
    model = model_of("gpt_neox")
    two = score(model, batch, dtype=torch.float32, token_budget=40)
    monkeypatch.setattr("dpo.modeling.scoring.lanes_for", lambda _: 1)
    one = score(model, batch, dtype=torch.float32, token_budget=40)
    for example, first, second in zip(batch, one, two, strict=True):
        for response, alone, beside in zip(example.responses, first, second, strict=True):
            assert len(alone) == len(response)
            torch.testing.assert_close(torch.tensor(beside), torch.tensor(alone))
