"""How many tokens go through a model at once, and the memory that they took on a GPU."""

import json
from types import SimpleNamespace

import pytest
import torch

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.modeling import budget
from dpo.modeling.budget import scoring_budget, token_budget
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


@pytest.fixture
def on_gpu(monkeypatch):
    """As if on a GPU of so many GiB."""

    def make(gib, products=torch.bfloat16):
        properties = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(budget, "compute_dtype", lambda *_: products)

    return make


def model_of(values, dtype=torch.float32):
    weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    own = SimpleNamespace(to_dict=lambda: values)
    return SimpleNamespace(config=own, parameters=lambda: iter([weight]))


@pytest.mark.parametrize(
    ("products", "tokens"),
    # an old GPU multiplies in float32, and keeps twice as much of each token
    [(torch.bfloat16, 8192), (torch.float32, 4096)],
)
def test_a_run_chooses_by_the_gpu_it_is_on(config, on_gpu, products, tokens):
    on_gpu(48, products)
    settings = restrict(config(LLAMA_1B, "optimizer=AdamW"), "preference")
    assert token_budget(settings, model_of(LLAMA_1B), "cuda") == tokens
    assert budget.FEW_TOKENS == 2048


@pytest.mark.parametrize("stage", ["reference", "evaluate"])
@pytest.mark.parametrize(("gib", "tokens"), [(80, 16384), (11, 8192), (8, 2048)])
def test_a_step_that_trains_nothing_chooses_too(config, on_gpu, stage, gib, tokens):
    """It has no settings of training: reading one raises."""
    on_gpu(gib)
    settings = restrict(config(LLAMA_1B), stage)
    assert scoring_budget(settings, model_of(LLAMA_1B), "cuda") == tokens
    assert scoring_budget(restrict(config(LLAMA_1B), stage), None, "cpu") == 2048
    few = restrict(config(LLAMA_1B, "micro_batch_tokens=512"), stage)
    assert scoring_budget(few, None, "cuda") == 512


def test_all_processes_take_what_the_smallest_gpu_takes(config, on_gpu, monkeypatch):
    """With tensor parallelism they pass the same rows, and wait for each other's parts of them."""
    on_gpu(80)
    monkeypatch.setattr(budget, "gather", lambda own: [own, 4096])
    assert token_budget(config(LLAMA_1B), model_of(LLAMA_1B), "cuda") == 4096
    assert scoring_budget(config(LLAMA_1B), model_of(LLAMA_1B), "cuda") == 4096


def test_a_few_long_pairs_must_fit_as_well(config):
    """Four pairs of 223 tokens are a short row, four with responses of 1,984 fill a long one."""
    words = ("optimizer=AdamW", "batch_size=4", "max_length=2048", "max_prompt_length=64")
    settings, machine = config(LLAMA_1B, *words), Machine(gpu_memory_gib=48)
    shape = architecture_of(settings.model)
    assert tokens_at_once(settings, shape, machine) == 8192
    longest = Lengths(prompt=64, chosen=1984, rejected=1984, longest=4032)
    assert plan_stage(settings, machine, longest).fits


def test_rows_of_an_evaluation_must_fit_where_all_logits_are_there(config):
    """Bloom's: 250,880 for each token of a padded row, however few pairs a step has."""
    bloom = {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16}
    settings = config({**bloom, "vocab_size": 250880}, "batch_size=2")
    shape = architecture_of(settings.model)
    chosen = tokens_at_once(settings, shape, Machine(gpu_memory_gib=24))
    # 16,384 tokens x 1.6 for padding x 250,880 logits x 2 bytes alone are 12.3 GiB
    assert chosen == 4096


def test_a_gpu_without_bfloat16_multiplies_in_float32(config):
    """V100 and T4: `compute_dtype=auto` is float32 there, and keeps twice as much of a token."""
    words = ("optimizer=AdamW", "micro_batch_tokens=4096")
    old, new = (
        plan_stage(config(LLAMA_1B, *words), Machine(gpu=gpu)).memory for gpu in ("V100", "A100")
    )
    assert old.activations > 1.5 * new.activations
    single = plan_stage(
        config(LLAMA_1B, *words, "model.compute_dtype=float32"), Machine(gpu="A100")
    )
    assert old.total == single.memory.total
