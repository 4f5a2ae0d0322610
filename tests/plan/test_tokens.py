"""How many tokens go through a model at once, and the memory that they took on a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from dpo.config.compose import compose
from dpo.modeling import budget
from dpo.modeling.budget import token_budget
from dpo.plan.architecture import architecture_of
from dpo.plan.estimate import plan_stage
from dpo.plan.job import GIB, Machine, job_of, tokens_at_once
from dpo.plan.lengths import Lengths
from dpo.plan.memory import predict

LLAMA_1B = {
    **{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632},
    **{"num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    **{"vocab_size": 49152, "max_position_embeddings": 2048},
}
SMOLLM2 = {
    **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536},
    **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    **{"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
}


@pytest.fixture
def config(tmp_path):
    def make(values, *words):
        (tmp_path / "config.json").write_text(json.dumps(values))
        fixed = ["model=blank_model", f"model.name_or_path={tmp_path}", "batch_size=64"]
        return compose([*fixed, *words]).config

    return make


@pytest.mark.parametrize(
    ("values", "words", "measured"),
    [
        (LLAMA_1B, ["micro_batch_tokens=15248"], 41.15),
        (LLAMA_1B, ["micro_batch_tokens=15248", "model.kernels=plain"], 50.23),
        (LLAMA_1B, ["micro_batch_tokens=15248", "model.kernels=liger"], 41.48),
        (LLAMA_1B, ["micro_batch_tokens=8192"], 32.03),
        (LLAMA_1B, ["micro_batch_tokens=4096"], 26.97),
        (LLAMA_1B, ["micro_batch_tokens=2048"], 23.52),
        (SMOLLM2, ["micro_batch_tokens=15248"], 12.39),
        (SMOLLM2, ["micro_batch_tokens=15248", "model.kernels=plain"], 15.88),
    ],
)
def test_the_account_is_what_an_h100_counted(config, values, words, measured):
    """GiB of tensors at the peak of nine steps of 64 HH pairs (11,684 to 15,248 tokens), AdamW,
    bfloat16 products (tests/benchmarks, contender ``ours``, torch 2.11)."""
    settings = config(values, "optimizer=AdamW", *words)
    # in HH of the steps' tokens; with 15,248 a step is one row
    lengths = Lengths(prompt=113, chosen=44, rejected=45, longest=768)
    job = job_of(settings, architecture_of(settings.model), Machine(gpu="H100"), lengths)
    memory = predict(job)
    assert (memory.total - memory.reserve) / GIB == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize(("gib", "tokens"), [(80, 16384), (48, 8192), (34, 4096), (24, 2048)])
def test_left_out_it_is_the_most_that_surely_fits(config, gib, tokens):
    settings, machine = config(LLAMA_1B, "optimizer=AdamW"), Machine(gpu_memory_gib=gib)
    shape = architecture_of(settings.model)
    assert tokens_at_once(settings, shape, machine) == tokens
    assert plan_stage(settings, machine).micro_batch_tokens == tokens
    twice = config(LLAMA_1B, "optimizer=AdamW", f"micro_batch_tokens={2 * tokens}")
    assert tokens == 16384 or plan_stage(twice, machine).memory.total > 0.85 * gib * GIB


def test_what_is_set_stays(config):
    settings = config(LLAMA_1B, "micro_batch_tokens=512")
    shape = architecture_of(settings.model)
    assert tokens_at_once(settings, shape, Machine()) == 512
    assert token_budget(settings, None, "cuda") == 512


def test_a_cpu_takes_few_and_so_does_what_is_not_known(config):
    settings = config(LLAMA_1B)
    shape = architecture_of(settings.model)
    assert tokens_at_once(settings, shape, Machine(gpus=0)) == 2048
    assert token_budget(settings, None, "cpu") == 2048
    unknown = config({**LLAMA_1B, "model_type": "nobody_knows"})
    assert tokens_at_once(unknown, architecture_of(unknown.model), Machine()) == 2048


def test_a_run_chooses_by_the_gpu_it_is_on(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=48 * 2**30)
    )
    model = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: LLAMA_1B))
    assert token_budget(config(LLAMA_1B, "optimizer=AdamW"), model, "cuda") == 8192
    assert budget.FEW_TOKENS == 2048
