"""Parameters, FLOPs, time and memory of a plan, against published and independent figures."""

import json
from dataclasses import replace

import pytest
import torch

from dpo.config.compose import compose
from dpo.config.models import ModelConfig
from dpo.errors import ConfigError, ModelError
from dpo.modeling import head
from dpo.modeling.attention import ARCHITECTURES
from dpo.plan.adapters import lora_parameters
from dpo.plan.architecture import _shipped, architecture_of, config_values
from dpo.plan.compute import flops, seconds
from dpo.plan.estimate import plan_stage
from dpo.plan.found_lengths import HH_PAIRS
from dpo.plan.job import GIB, Machine, job_of
from dpo.plan.lengths import DEFAULT, Lengths
from dpo.plan.memory import LOGITS_AT_ONCE, PACKED_TYPES, SMALLEST_TILE, predict
from dpo.plan.preflight import check_fit, preflight
from dpo.plan.sizes import from_config
from dpo.plan.split import check_spread

PUBLISHED = {
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "huggyllama/llama-7b": 6_738_415_616,
    "HuggingFaceH4/mistral-7b-sft-beta": 7_241_732_096,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "gpt2-xl": 1_557_611_200,
    "gpt2-large": 774_030_080,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
SHIPPED = ["pythia28", "pythia69", "llama7b", "zephyr", "gptj", "gpt2-xl", "gpt2-large", "smollm2"]


def config(*words):
    return compose(list(words)).config


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert from_config(_shipped()[name]).parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_the_same_shape(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(_shipped()[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        )
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]


def test_every_shipped_choice_is_known_without_the_hub():
    for choice in SHIPPED:
        assert architecture_of(config(f"model={choice}").model).parameters > 1e8
    assert architecture_of(ModelConfig()).parameters == 231_168


def test_a_folder_needs_its_configuration_alone(tmp_path):
    values = config_values(ModelConfig())
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert architecture_of(ModelConfig(name_or_path=str(tmp_path))).n_layers == 2
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="has no hidden_size"):
        architecture_of(ModelConfig(name_or_path=str(tmp_path)))


def test_an_unknown_model_is_named():
    with pytest.raises(ModelError, match="org/none is not known"):
        architecture_of(ModelConfig(name_or_path="org/none"))


def test_flops_of_a_pair_of_pythia_28():
    """130 + 80 + 80 tokens.

    blocks      6 x 32 x 12 x 2560^2 x 290                              4.379e12
    attention   6 x 2 x 32 x 2560 x (130 131/2 + 2 (80 130 + 80 81/2))  0.035e12
    head        8 x 2560 x 50304 x 160 (computed twice forward)         0.165e12
    """
    shape = architecture_of(config("model=pythia28").model)
    found = flops(shape, Lengths(130, 80, 80)).training
    assert found == pytest.approx(4.379e12 + 0.0352e12 + 0.1648e12, rel=1e-3)
    assert found == pytest.approx(4.58e12, rel=2e-3)


def test_what_is_shared_recomputed_or_frozen_changes_the_flops_as_it_should():
    shape = architecture_of(config("model=pythia28").model)
    lengths = Lengths(100, 50, 50)
    base = flops(shape, lengths)
    # without sharing the prompt passes twice: 300 tokens instead of 200
    unshared = flops(shape, lengths, layout="unshared")
    assert unshared.forward / base.forward == pytest.approx(1.5, abs=0.03)
    assert flops(shape, lengths, recomputed_share=1.0).training / base.training == pytest.approx(
        4 / 3, abs=0.02
    )
    assert flops(shape, lengths, frozen=True).training / base.training == pytest.approx(
        2 / 3, abs=0.02
    )
    assert flops(shape, lengths.for_sft()).training < base.training


def test_the_published_runs_of_four_a100():
    """The DPO reference code: Pythia-2.8B, HH, 160,800 pairs in 2 h 45 min (4.1 pairs/s a GPU).

    It pads both sequences of a batch (400 to 450 tokens each: half of the 800 to 900 token slots a
    pair in padded batches) and passes them through policy (forward, backward) and reference
    (forward). At the default utilisation of 25 % the formula gives 2.6 to 3.0 hours, within 10 % of
    the published time.
    """
    shape = architecture_of(config("model=pythia28").model)
    lengths = Lengths(128, 42, 53, padded=425)
    each = flops(shape, lengths, layout="padded")
    total = (each.training + each.forward) * HH_PAIRS
    hours = seconds(total, gpus=4, peak_tflops=312, utilisation=0.25) / 3600
    assert hours == pytest.approx(2.75, rel=0.1)


def test_packed_types_are_those_of_the_attention():
    assert set(PACKED_TYPES) == set(ARCHITECTURES)


def test_logits_at_once_are_those_of_the_output_layer():
    assert LOGITS_AT_ONCE == head.TILE_ELEMENTS
    assert SMALLEST_TILE == head.SMALLEST_TILE


def test_logits_that_a_gpu_holds_are_counted():
    """By hand: tiles of 2^26 elements. In float32 two of them, 2^29 bytes; in bfloat16 both and the
    two in 16 bits that they come from and go to, 0.75 x 2^30. Beside that the gradient of Gemma's
    output weights, and with autocast two copies of them."""
    words = ("trainer=BasicTrainer", "micro_batch_tokens=2048")
    output = 256_000 * 2048
    values = {
        **{"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "head_dim": 256},
        **{"num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 16384},
        "vocab_size": 256_000,
    }
    job = job_of(config(*words), from_config(values), Machine(gpus=1), DEFAULT)
    job = replace(job, several_micro_batches=True)
    assert predict(replace(job, mode="float32")).logits == 2**29 + 4 * output
    assert predict(replace(job, mode="autocast")).logits == 0.75 * 2**30 + 6 * output


def test_states_by_hand():
    """Pythia-2.8B in float32 on one GPU: 4 bytes a weight three times, AdamW four times."""
    words = ["model=pythia28", "model.compute_dtype=float32"]
    plan = plan_stage(config(*words), Machine())
    each = 4 * 2_775_208_960
    assert plan.memory.weights == each
    assert plan.memory.gradients == each
    adamw = plan_stage(config(*words, "optimizer=AdamW"), Machine())
    assert adamw.memory.optimizer == 2 * each
    lora = plan_stage(config(*words, "lora.enabled=true", "optimizer=AdamW"), Machine())
    # rank 16 on qkv, dense and both matrices of the MLP, 32 layers
    adapter = 32 * 16 * (2560 * 4 + 2560 * 2 + 2560 * 5 * 2)
    assert lora_parameters(architecture_of(config("model=pythia28").model), 16) == adapter
    assert lora.memory.optimizer == 2 * 4 * adapter
    assert lora.memory.total < plan.memory.total / 2


def test_casts_and_gathered_weights_are_gone_when_the_optimiser_works():
    """Few tokens: the update's peak is weights, gradients, squares and their roots, in shards."""
    settings = config("model=zephyr", "trainer=FSDPTrainer")
    memory = plan_stage(settings, Machine(gpus=2, gpu_memory_gib=400)).memory
    assert memory.total - memory.reserve == 4 * 4 * 7_241_732_096 / 2


def test_adapter_parameters_are_those_of_peft():
    from dpo.config.models import LoraConfig
    from dpo.config.places import builtin
    from dpo.modeling.load import load_model
    from dpo.modeling.lora import add_adapter, trained_parameters

    model = load_model(builtin("builtin:tiny"), torch.float32)
    add_adapter(model, LoraConfig(enabled=True, rank=4), "base")
    assert trained_parameters(model) == lora_parameters(architecture_of(ModelConfig()), 4)


def test_sharding_divides_and_copies_do_not():
    words = ["model=pythia69", "batch_size=64", "model.fsdp_policy_mp=bfloat16", "optimizer=AdamW"]
    one, two, eight = (
        plan_stage(config(*words, "trainer=FSDPTrainer"), Machine(gpus=n)).memory for n in (1, 2, 8)
    )
    assert one.total > two.total > eight.total
    assert eight.optimizer == pytest.approx(8 * 6_857_302_016 / 8)
    replicas = [*words, "trainer=FSDPTrainer", "trainer.replicas=2"]
    # two groups of four: each GPU holds a quarter
    halved = plan_stage(config(*replicas), Machine(gpus=8)).memory
    assert halved.optimizer == pytest.approx(8 * 6_857_302_016 / 4)


def test_tensor_parallelism_gathers_nothing_and_casts_its_share():
    """zephyr's 7,241,732,096 weights over 2 GPUs, in the middle of a step with AdamW.

    A half of weights, gradients and the two moments, in float32; casts to bfloat16 of half of the
    weights in matrices of the blocks (all but embeddings and output of 32,000 x 4,096 each, and 65
    norms of 4,096); 12 bytes for each of the logits, 16,000 a token, of those of the 768 tokens of
    the micro-batch that may be responses' (95 of 223 on average, and a quarter more), and of the
    half of the output weights a gradient and a cast, 4 + 2 bytes each.
    """
    words = ["model=zephyr", "trainer=TensorParallelTrainer", "batch_size=64", "optimizer=AdamW"]
    words += ["gradient_accumulation_steps=32"]
    memory = plan_stage(config(*words), Machine(gpus=2)).memory
    n_weights, output = 7_241_732_096, 32_000 * 4_096
    multiplied = n_weights - 2 * output - 65 * 4_096
    assert memory.weights == (4 * n_weights + 2 * multiplied) / 2
    assert memory.gradients == 4 * n_weights / 2
    assert memory.optimizer == 2 * 4 * n_weights / 2
    assert memory.logits == pytest.approx(12 * 768 * 1.25 * 95 / 223 * 16_000 + 6 * output / 2)
    # with FSDP around it a GPU keeps a quarter, and gathers halves
    four = plan_stage(config(*words, "trainer.tensor_parallel=2"), Machine(gpus=4)).memory
    assert four.optimizer == memory.optimizer / 2
    assert four.weights > memory.weights - 4 * n_weights / 4


def test_processes_that_share_a_layer_take_the_same_examples():
    """16 examples: 4 each for 4 processes, 8 for each of two pairs, 16 for one group of four."""

    def tokens(*words):
        config = compose(["model=pythia28", "batch_size=16", "micro_batch_tokens=99999", *words])
        job = job_of(config.config, architecture_of(config.config.model), Machine(gpus=4), DEFAULT)
        return job.micro_batch_tokens

    split = "trainer=TensorParallelTrainer"
    found = [tokens("trainer=FSDPTrainer"), tokens(split, "trainer.tensor_parallel=2")]
    each = 1.5 * DEFAULT.tokens
    assert [*found, tokens(split)] == [round(n * each) for n in (4, 8, 16)]


def test_what_does_not_fit_says_what_would():
    small = Machine(gpus=1, gpu_memory_gib=40)
    settings = config("model=pythia28", "optimizer=AdamW", "batch_size=64", "trainer=FSDPTrainer")
    plan = plan_stage(settings, small)
    assert not plan.fits
    text = "\n".join(plan.advice)
    assert "gpus=2" in text
    assert "lora.enabled=true" in text
    for line in plan.advice:
        # each piece of advice is true: its settings fit when they are planned
        words = [word for word in line.partition(":")[0].split() if "=" in word]
        gpus = next((int(w[5:]) for w in words if w.startswith("gpus=")), 1)
        changed = [w for w in words if not w.startswith("gpus=")]
        again = config("model=pythia28", "optimizer=AdamW", "batch_size=64", "trainer=FSDPTrainer")
        again = config(
            "model=pythia28",
            "batch_size=64",
            *([] if any(w.startswith("optimizer") for w in changed) else ["optimizer=AdamW"]),
            "trainer=FSDPTrainer",
            *[w for w in changed if not w.startswith("trainer")],
        )
        assert plan_stage(again, Machine(gpus=gpus, gpu_memory_gib=40)).fits, line
    with pytest.raises(ConfigError, match="predicted to need") as error:
        check_fit(settings, small)
    assert "gpus=2" in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "gpus", "gib"),
    [
        (["trainer=TensorParallelTrainer", "loss=orpo"], 8, 8),
        (["trainer=TensorParallelTrainer", "trainer.tensor_parallel=4", "loss=orpo"], 8, 8),
        (["trainer=FSDPTrainer", "batch_size=1", "model.policy_dtype=bfloat16"], 1, 16),
        (["trainer=FSDPTrainer", "batch_size=6", "gradient_accumulation_steps=3"], 2, 24),
    ],
)
def test_no_advice_is_what_the_trainers_refuse(words, gpus, gib):
    """LoRA with tensor parallelism, 64 processes for 32 heads, a batch that does not come out."""
    shape = architecture_of(config("model=pythia69").model)
    plan = plan_stage(config("model=pythia69", *words), Machine(gpus=gpus, gpu_memory_gib=gib))
    assert plan.advice
    for line in plan.advice:
        changed = [word for word in line.partition(":")[0].split() if "=" in word]
        more = next((int(word[5:]) for word in changed if word.startswith("gpus=")), gpus)
        keys = {word.partition("=")[0] for word in changed}
        kept = [word for word in words if word.partition("=")[0] not in keys]
        settings = [word for word in changed if not word.startswith("gpus=")]
        check_spread(config("model=pythia69", *kept, *settings), shape, more)


def test_examples_longer_than_the_context_are_refused_as_training_does():
    """Pythia's is 2,048 tokens; Bloom, whose seq_length says as much, takes any length."""
    plan_stage(config("model=pythia28", "max_length=2048"), Machine(gpus=1))
    with pytest.raises(ConfigError, match="max_length is 2049, the model's context 2048 tokens"):
        plan_stage(config("model=pythia28", "max_length=2049"), Machine(gpus=1))
    sizes = {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 512, "seq_length": 2048}
    assert from_config({"model_type": "bloom", **sizes}).context == 0


def test_lora_with_tensor_parallelism_is_refused_as_the_trainer_does():
    settings = config("model=pythia28", "trainer=TensorParallelTrainer", "lora.enabled=true")
    with pytest.raises(ConfigError, match="LoRA and tensor parallelism cannot be used together"):
        plan_stage(settings, Machine(gpus=4, gpu_memory_gib=80))


def test_gathering_in_bfloat16_is_advised_where_casts_of_float32_weights_do_not_fit():
    """Autocast keeps 2 bytes of each of the 6.48 billion weights in Llama 7B's blocks' matrices
    (32 x (4 x 4096 x 4096 + 3 x 4096 x 11008)), 12.1 GiB; gathered in bfloat16 none is kept."""
    settings = ["model=llama7b", "batch_size=64", "trainer=FSDPTrainer"]
    machine = Machine(gpus=8, gpu_memory_gib=24)
    plan = plan_stage(config(*settings), machine)
    assert not plan.fits
    assert plan.advice[0].startswith("model.fsdp_policy_mp=bfloat16: ")
    # no more GPUs are needed, nor anything beside
    assert not any("gpus=8" in line or "micro_batch_tokens=5" in line for line in plan.advice)
    half = plan_stage(config(*settings, "model.fsdp_policy_mp=bfloat16"), machine)
    assert half.fits
    casts = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 2
    assert plan.memory.weights - half.memory.weights > 0.9 * casts
    assert not half.advice


def test_nothing_fits_into_a_gibibyte():
    plan = plan_stage(config("model=llama7b"), Machine(gpu_memory_gib=1, gpus=1))
    assert "nothing that this project can set" in plan.advice[0]


def test_preflight_of_a_pipeline_run():
    plans = preflight({"model": "tiny"}, Machine(gpus=1, gpu="L4"))
    assert set(plans) == {"sft", "preference"}
    assert all(plan.fits for plan in plans.values())
    assert preflight({"model": "org/unknown"}, Machine()) == {}
    with pytest.raises(ConfigError, match="sft stage"):
        preflight({"model": "pythia69"}, Machine(gpus=1, gpu_memory_gib=24))
    # a CPU has no memory that is known here
    assert preflight({"model": "pythia69"}, Machine(gpus=0))["sft"].fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "RTX"}, "name one of"),
        ({"gpus": -1}, "no number of GPUs"),
        ({"utilisation": 1.5}, "no share"),
        ({"gpu_memory_gib": 0.0}, "above 0"),
    ],
)
def test_a_machine_that_cannot_be(arguments, message):
    with pytest.raises(ConfigError) as error:
        Machine(**arguments)
    assert message in str(error.value)


def test_batch_arithmetic_is_checked():
    with pytest.raises(ConfigError, match="multiple of 12"):
        plan_stage(
            config(
                "model=tiny", "trainer=FSDPTrainer", "batch_size=8", "gradient_accumulation_steps=4"
            ),
            Machine(gpus=3),
        )


def test_smaller_micro_batches_and_checkpointing_need_less():
    base = ["model=smollm2", "batch_size=64"]
    shape = architecture_of(config(*base).model)

    def total(*more):
        return predict(job_of(config(*base, *more), shape, Machine(), DEFAULT)).total / GIB

    few, usual, many = (total(f"micro_batch_tokens={n}") for n in (1024, 2048, 4096))
    assert few < usual < many
    full, selective = (total(f"activation_checkpointing={m}") for m in ("full", "selective"))
    assert full < selective < total()
