"""Training over several processes gives the trajectory of one, whichever way it is spread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from dpo.config.compose import compose
from dpo.config.places import builtin
from dpo.config.stages import restrict, stage_json
from dpo.distributed.launch import processes_here
from dpo.errors import ConfigError, MissingDependency, ModelError
from dpo.modeling.blocks import find_blocks
from dpo.modeling.load import load_model
from dpo.modeling.vocab_parallel import _own
from dpo.train.spread import shares, spread_layers
from dpo.train.stage import run_train
from dpo.train.tensor_parallel import check_model
from tests.modeling.architectures import random_model
from tests.train.conftest import SETTINGS

# 22 examples in batches of 8: the last one has 6, three for each of two processes
# RMSprop makes full steps of elements whose gradient is all rounding, so also two ways to split the
# work of one process drift apart; a small rate keeps that below what is compared
RUN = [
    *(*SETTINGS, "n_examples=22", "gradient_accumulation_steps=2", "checkpoint_seconds=0"),
    *("lr=1e-6", "model.compute_dtype=float32"),
]
FSDP, TENSOR = "trainer=FSDPTrainer", "trainer=TensorParallelTrainer"
SAMPLES = ("sample_during_eval=true", "n_eval_model_samples=2")
LOSSES = {
    "sft": ["loss=sft"],
    "dpo": ["loss=dpo"],
    "conservative": ["loss=dpo", "loss.label_smoothing=0.1"],
    "reference_free": ["loss=dpo", "loss.reference_free=true"],
    "ipo": ["loss=ipo"],
    "hinge": ["loss=hinge"],
    "robust": ["loss=robust", "loss.label_smoothing=0.1"],
    "simpo": ["loss=simpo"],
    "orpo": ["loss=orpo"],
}


def config_of(loss, *more):
    stage = "sft" if loss == "sft" else "preference"
    return restrict(compose([*RUN, *LOSSES[loss], *more]).config, stage)


def job_of(prepared, out, loss, *more, base=None):
    """A training for ``tests.train.many``; the reference is scored by the run itself."""
    stage = "sft" if loss == "sft" else "preference"
    paths = {"output": str(out), "pairs": str(prepared.data)}
    if base is None and loss != "sft":
        paths["base"] = str(prepared.sft)
    return {"stage": stage, "settings": stage_json(config_of(loss, *more), stage), "paths": paths}


def run_one(prepared, out, loss, *more, base=None):
    paths = {k: Path(v) for k, v in job_of(prepared, out, loss, *more, base=base)["paths"].items()}
    run_train(config_of(loss, *more), paths.pop("output"), **paths)
    return out


def run_many(jobs, folder, processes):
    """All jobs, one after the other, in one set of processes."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    arguments = ["--nproc-per-node", str(processes), "--standalone", "-m", "tests.train.many"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, str(file)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stderr.splitlines() if "rank" in line]
    assert done.returncode == 0, "\n".join(lines[-40:])


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(one, many, *, near=1e-4):
    left, right = log_of(one), log_of(many)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        skipped = {"examples_per_second", "rewards_train/accuracies"}
        # accuracies before and at the first step are decided by rounding: their margins are 0
        if abs(a.get("rewards_eval/margins", 1)) < 1e-4:
            skipped.add("rewards_eval/accuracies")
        for key in a.keys() - skipped:
            assert b[key] == pytest.approx(a[key], rel=near, abs=near), key
    a, b = load_file(one / "model.safetensors"), load_file(many / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert b[name] == pytest.approx(a[name], abs=2e-5), name


def with_a_window(folder):
    """A model that attends to the last 60 tokens alone, with the tiny model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin("builtin:tiny"))
    settings = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"max_position_embeddings": 256, "sliding_window": 60},
    }
    random_model("mistral", settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_two_processes_follow_one(prepared, tmp_path):
    jobs = [
        job_of(prepared, tmp_path / "sharded-dpo", "dpo", FSDP),
        job_of(prepared, tmp_path / "split-dpo", "dpo", TENSOR),
        job_of(prepared, tmp_path / "sharded-sft", "sft", FSDP, *SAMPLES),
        job_of(prepared, tmp_path / "split-sft", "sft", TENSOR, *SAMPLES),
    ]
    # some rows fit its window and others do not, in one process and not in the other
    folder = with_a_window(tmp_path / "model")
    window = (f"model.name_or_path={folder}", "model.block_name=null", "max_length=128")
    jobs.append(job_of(prepared, tmp_path / "sharded-window", "dpo", FSDP, *window, base="none"))
    run_many(jobs, tmp_path, 2)
    one = run_one(prepared, tmp_path / "window", "dpo", *window, base="none")
    compare(one, tmp_path / "sharded-window")
    for loss, more in (("dpo", ()), ("sft", SAMPLES)):
        one = run_one(prepared, tmp_path / loss, loss, *more)
        for way in ("sharded", "split"):
            compare(one, tmp_path / f"{way}-{loss}")
            if more:
                # sampled while training, in every process, written once
                samples = (tmp_path / f"{way}-{loss}/samples.jsonl").read_text()
                assert samples == (one / "samples.jsonl").read_text()
    # what was saved is an ordinary folder
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "split-dpo")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.long
def test_two_processes_follow_one_for_every_other_loss(prepared, tmp_path):
    others = [loss for loss in LOSSES if loss not in ("sft", "dpo")]
    ways = {"sharded": FSDP, "split": TENSOR}
    jobs = [
        job_of(prepared, tmp_path / f"{way}-{loss}", loss, trainer)
        for loss in others
        for way, trainer in ways.items()
    ]
    run_many(jobs, tmp_path, 2)
    for loss in others:
        one = run_one(prepared, tmp_path / loss, loss)
        for way in ways:
            compare(one, tmp_path / f"{way}-{loss}")


def small_model(kind, folder, prepared):
    """A random model with grouped heads and, for Llama, tied embeddings."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig
    from transformers import MistralForCausalLM as Mistral

    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    else:
        model = Mistral(MistralConfig(**sizes))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepared.sft).save_pretrained(folder)
    return ["model=blank_model", f"model.name_or_path={folder}"]


@pytest.mark.long
def test_four_processes_follow_one(prepared, tmp_path):
    llama = small_model("llama", tmp_path / "llama", prepared)
    mistral = small_model("mistral", tmp_path / "mistral", prepared)
    plain = "gradient_accumulation_steps=1"
    split = (TENSOR, "trainer.tensor_parallel=2")
    more = {
        # a mesh of two axes: two processes share a layer, twice
        "mesh": [*llama, *split, *SAMPLES],
        # shards within a pair of processes, the same again in the other pair
        "hybrid": [*llama, FSDP, "trainer.replicas=2", plain],
        "mistral-mesh": [*mistral, *split, "activation_checkpointing=full"],
        "mistral-sharded": [*mistral, FSDP, plain, "activation_checkpointing=selective"],
    }
    losses = {name: "sft" if "hybrid" in name else "dpo" for name in more}
    jobs = [
        job_of(prepared, tmp_path / name, losses[name], *extra, base=True)
        for name, extra in more.items()
    ]
    run_many(jobs, tmp_path, 4)
    for name, extra in more.items():
        alone = [word for word in extra if not word.startswith("trainer")]
        one = run_one(prepared, tmp_path / f"one-{name}", losses[name], *alone, base=True)
        compare(one, tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.long
def test_bfloat16_loses_no_gradient_from_one_row_to_the_next(prepared, tmp_path):
    # casts of weights that autocast kept from an earlier row came too late for FSDP: the norm was
    # 40.4 where one process had 51.0
    more = ("model.compute_dtype=bfloat16",)
    run_many([job_of(prepared, tmp_path / "many", "sft", FSDP, *more)], tmp_path, 2)
    one = run_one(prepared, tmp_path / "one", "sft", *more)
    for a, b in zip(log_of(one), log_of(tmp_path / "many"), strict=True):
        if "grad_norm" in a:
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (["gradient_accumulation_steps=8"], ConfigError, "multiple of 16"),
        (["model.block_name=NoSuchBlock"], ModelError, "GPTNeoXLayer"),
        (["n_examples=1"], ConfigError, "2 processes for 1 training examples"),
        (["trainer.replicas=3"], ConfigError, "use one of 1, 2"),
    ],
)
@pytest.mark.long
def test_a_child_fails_with_its_own_message(
    settings, error, words, prepared, tmp_path, monkeypatch
):
    monkeypatch.setenv("DPO_PROCESSES", "2")
    config = config_of("sft", FSDP, *settings)
    with pytest.raises(error, match=words):
        run_train(config, tmp_path / "out", pairs=prepared.data)
    assert not (tmp_path / "out").exists()


class Shape:
    """The part of a model's configuration that is looked at."""

    def __init__(self, model_type, heads, groups=None, vocabulary=1024, inner=64):
        self.model_type, self.num_attention_heads = model_type, heads
        self.num_key_value_heads = groups
        self.vocab_size, self.intermediate_size = vocabulary, inner


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        (Shape("gpt2", 4), 2, "gpt2 models.*FSDPTrainer.*gpt_neox, llama, mistral"),
        # SmolLM2-135M
        (Shape("llama", 9, 3, 49152, 1536), 2, "9 attention heads, 3 key/value heads.*are 3 "),
        (Shape("llama", 8, 2, 1024, 64), 4, "2 key/value heads.*are 2 "),
        (Shape("gpt_neox", 8, None, 1026, 64), 4, "1,026 tokens in the vocabulary.*are 2 "),
        (Shape("mistral", 7, 5, 1024, 64), 2, "no number of processes"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(shape, size, words):
    import re

    with pytest.raises(ConfigError) as caught:
        check_model(shape, size)
    assert re.search(words, str(caught.value), re.DOTALL)


def test_a_block_that_the_model_lacks_is_named_with_the_way_out(prepared):
    """A shipped model's setting stays when model.name_or_path alone is changed."""
    model = load_model(prepared.sft, torch.float32)
    with pytest.raises(ModelError, match=r"model\.block_name=null.*GPTNeoXLayer"):
        find_blocks(model, "LlamaDecoderLayer")


@pytest.mark.parametrize(
    ("sizes", "rest", "devices", "expected"),
    [
        ([1, 1, 1, 1], 0, 2, [0, 0, 1, 1]),
        # embeddings as large as two layers: they take the room of two
        ([1, 1, 1, 1, 1, 1], 2, 2, [0, 0, 1, 1, 1, 1]),
        ([1] * 6, 0, 3, [0, 0, 1, 1, 2, 2]),
        ([1, 1], 100, 2, [1, 1]),
    ],
)
def test_layers_are_spread_by_their_bytes(sizes, rest, devices, expected):
    assert shares(sizes, rest, devices) == expected


def test_a_model_whose_layers_were_spread_computes_the_same(prepared):
    # one device under two names: what a machine without GPUs can show of it
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(prepared.sft)
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    spread_layers(model, find_blocks(model, None), [torch.device("cpu"), torch.device("cpu:0")])
    assert torch.equal(model(ids).logits, expected)


def test_a_model_without_known_layers_is_not_spread():
    """It was an IndexError, in which a run on two GPUs ended."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 16}
    model = random_model("openai-gpt", sizes)
    with pytest.raises(ModelError, match="spread over 2 GPUs") as caught:
        spread_layers(model, find_blocks(model, None), [torch.device("cpu")] * 2)
    assert "model.block_name" in caught.value.fix


def test_each_target_is_looked_up_by_the_process_that_has_it():
    targets = torch.tensor([0, 3, 4, 7])
    rows, here = _own(targets, first=4, size=4)
    assert here.tolist() == [0, 0, 1, 1]
    assert rows.tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.replicas=2"], "belongs to FSDPTrainer"),
        ([FSDP, "trainer.tensor_parallel=2"], "belongs to TensorParallelTrainer"),
    ],
)
def test_a_setting_of_another_trainer_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        compose([*RUN, *settings])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activations_are_recomputed_through_the_same_attention(mode, prepared, tmp_path):
    one = run_one(prepared, tmp_path / "one", "dpo")
    recomputed = run_one(prepared, tmp_path / "other", "dpo", f"activation_checkpointing={mode}")
    compare(one, recomputed, near=1e-6)


def test_samples_while_training(prepared, tmp_path):
    more = ["sample_during_eval=true", "n_eval_model_samples=2"]
    run_train(config_of("sft", *more), tmp_path / "out", **prepared.paths(sft=True))
    lines = (tmp_path / "out/samples.jsonl").read_text(encoding="utf-8").splitlines()
    # before the first and after the last of three steps
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 3, 3]
    assert all(json.loads(line)["prompt"] for line in lines)


def test_wandb_that_is_missing_is_a_clear_error(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of("sft", "wandb.enabled=true")
    with pytest.raises(MissingDependency, match="wandb is not installed"):
        run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    assert not (tmp_path / "out").exists()


def test_debug_asks_for_no_wandb(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of("sft", "wandb.enabled=true", "debug=true")
    run_train(config, tmp_path / "out", **prepared.paths(sft=True))
    assert (tmp_path / "out/model.safetensors").is_file()


def test_one_process_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.delenv("DPO_PROCESSES", raising=False)
    assert processes_here() >= 1
