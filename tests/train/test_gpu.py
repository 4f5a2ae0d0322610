"""Training on a GPU against the same on the CPU, and against itself (``make test-gpu``)."""

import copy
from types import SimpleNamespace

import pytest
import torch

from dpo.distributed.device import best_device
from dpo.modeling.generation import answer
from dpo.modeling.repeatable import same_bits
from dpo.train.optimizer import build_optimizer
from dpo.train.step import Objective
from tests.train.test_fake_gpu import BUDGET, build, given, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: make test-gpu"),
]


def trained(model, loss, device, dtype, *words):
    """Losses of five steps on the same pairs, and the model after them."""
    config = settings(f"loss={loss}", "lr=1e-4", *words)
    model = copy.deepcopy(model).to(device)
    pairs, known = given(loss)
    objective = Objective(model, config.loss, dtype, BUDGET)
    optimizer = build_optimizer(model.parameters(), config)
    reference = known and [known[pair.pair_id] for pair in pairs]
    losses = []
    for _ in range(5):
        losses.append(objective.accumulate(pairs, reference, 2)["loss/train"].double().mean())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), model


@pytest.mark.parametrize("loss", ["sft", "dpo", "ipo", "hinge", "robust", "simpo", "orpo"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj"])
def test_a_gpu_trains_as_the_cpu(name, loss):
    """In float32, which on a GPU is that of torch's default, not TF32."""
    assert best_device() == "cuda"
    model = build(name)
    here, _ = trained(model, loss, "cpu", torch.float32)
    there, _ = trained(model, loss, "cuda", torch.float32)
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["RMSprop", "AdamW"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj"])
def test_the_same_bits_come_each_time(name, optimizer):
    """In bfloat16, through flash attention: what going on from a checkpoint relies on."""
    best_device()
    model = build(name)
    with same_bits(True):
        _, first = trained(model, "dpo", "cuda", torch.bfloat16, f"optimizer={optimizer}")
        for _ in range(3):
            _, again = trained(model, "dpo", "cuda", torch.bfloat16, f"optimizer={optimizer}")
            for left, right in zip(first.parameters(), again.parameters(), strict=True):
                assert torch.equal(left, right)


def test_greedy_answers_are_those_of_the_cpu():
    model, prompts = build("llama").double(), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    tokenizer = SimpleNamespace(eos_token_id=0)
    here = answer(model, tokenizer, prompts, max_new_tokens=12)
    there = answer(model.cuda(), tokenizer, prompts, max_new_tokens=12)
    assert there == here
