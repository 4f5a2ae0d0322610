"""The code of training, scoring and answering with tensors that say they are on a GPU.

What is on another device by mistake, or makes the CPU wait for the GPU in a micro-batch, shows
here; kernels and values do not (``make test-gpu``).
"""

from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpo.config.compose import compose
from dpo.data.loader import Order
from dpo.data.log_probs import PairLogProbs
from dpo.modeling import plain
from dpo.modeling.generation import answer
from dpo.modeling.head import _TokenLogProbs, has_linear_cross_entropy
from dpo.modeling.kernels import apply_kernels
from dpo.modeling.lora import add_adapter
from dpo.modeling.recompute import checkpoint_activations
from dpo.modeling.scoring import score
from dpo.modeling.vocab_parallel import _VocabParallel
from dpo.train import stage
from dpo.train.data import Examples
from dpo.train.log import MetricLog
from dpo.train.spread import spread_layers
from dpo.train.step import Objective
from dpo.train.trainer import Trainer
from tests.modeling.test_packing import VOCABULARY, examples, tiny_config
from tests.support.fake_gpu import DEVICE, fake_gpu

LENGTHS = [(7, 5, 9), (3, 1, 2), (10, 16, 6), (30, 20, 20), (8, 8, 8)]
BUDGET = 120


def config_of(name):
    from transformers import AutoConfig

    sizes = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4}
    match name:
        case "gptj":
            return AutoConfig.for_model(name, **sizes, n_embd=32, n_positions=128, rotary_dim=8)
        case "bloom":
            return AutoConfig.for_model(name, **sizes, hidden_size=32)
        case "heads of 12":
            config = tiny_config("llama")
            config.hidden_size, config.head_dim = 48, 12
            return config
    return tiny_config(name)


def build(name):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config_of(name)).eval()


def settings(*words):
    return compose([f"micro_batch_tokens={BUDGET}", *words]).config


def given(loss):
    """Pairs with the reference's log-probabilities; for SFT, chosen responses alone."""
    pairs = examples(LENGTHS)
    if loss == "sft":
        pairs = [replace(pair, responses=pair.responses[:1]) for pair in pairs]
    known = {
        pair.pair_id: PairLogProbs("", "", *(np.zeros(len(r), np.float32) for r in pair.responses))
        for pair in pairs
        if loss not in ("sft", "simpo", "orpo")
    }
    return pairs, known or None


def accumulated(gpu, model, config, dtype=torch.bfloat16):
    """How often the CPU waited in the micro-batches of a step, and the calls of flash attention.

    At the step's end all figures come to the CPU."""
    pairs, known = given(config.loss.name)
    objective = Objective(model, config.loss, dtype, config.micro_batch_tokens)
    gpu.waits.clear()
    gpu.kernels.clear()
    reference = known and [known[pair.pair_id] for pair in pairs]
    figures = objective.accumulate(pairs, reference, 2)
    assert all(
        weight.grad.is_cuda for weight in objective.model.parameters() if weight.grad is not None
    )
    calls = sum("varlen_attn" in name for name in gpu.kernels)
    return len(gpu.waits) - len(figures), calls


@pytest.mark.parametrize("loss", ["sft", "dpo", "ipo", "hinge", "robust", "simpo", "orpo"])
def test_no_micro_batch_waits_for_the_gpu(loss):
    """Two layers and two rows: flash attention is called four times."""
    model = build("llama")
    with fake_gpu() as gpu:
        assert accumulated(gpu, gpu.move(model), settings(f"loss={loss}")) == (0, 4)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "mistral", "qwen3", "gemma", "phi3", "opt"])
def test_architectures_of_the_packed_path_run_on_a_gpu(name):
    model = build(name)
    with fake_gpu() as gpu:
        assert accumulated(gpu, gpu.move(model), settings()) == (0, 4)


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    [
        ("llama", (9, 0), torch.float32),
        # Turing has no flash attention: a T4 in float16
        ("llama", (7, 5), torch.float16),
        # heads are multiples of 8 there
        ("heads of 12", (9, 0), torch.bfloat16),
    ],
)
def test_what_flash_attention_does_not_take_goes_another_way(name, capability, dtype):
    model = build(name)
    with fake_gpu(capability) as gpu:
        assert accumulated(gpu, gpu.move(model), settings(), dtype) == (0, 0)


@pytest.mark.parametrize("pads", [True, False], ids=["padded", "one by one"])
@pytest.mark.parametrize("name", ["gptj", "bloom"])
def test_the_plain_path_runs_on_a_gpu(name, pads):
    model = build(name)
    setattr(model, plain._PADS, pads)
    with fake_gpu() as gpu:
        assert accumulated(gpu, gpu.move(model), settings()) == (0, 0)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_run_on_a_gpu(mode):
    model = build("llama")
    checkpoint_activations(model, mode)
    with fake_gpu() as gpu:
        assert accumulated(gpu, gpu.move(model), settings())[0] == 0


def test_an_adapter_runs_on_a_gpu():
    model, config = build("llama"), settings("lora.enabled=true")
    add_adapter(model, config.lora, "base")
    with fake_gpu() as gpu:
        assert accumulated(gpu, gpu.move(model), config)[0] == 0


@pytest.mark.skipif(not has_linear_cross_entropy(), reason="this torch has none")
def test_torch_s_output_layer_runs_on_a_gpu():
    model = build("llama")
    apply_kernels(model, "auto", device="cuda", output_layer="torch")
    with fake_gpu() as gpu:
        assert accumulated(gpu, gpu.move(model), settings())[0] == 0


def test_the_backward_passes_of_the_output_layer_wait_for_nothing(monkeypatch):
    """torch's engine is not there; ours are functions of their own."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    with fake_gpu() as gpu:
        hidden, weight = (torch.zeros(n, 32, device=DEVICE) for n in (9, VOCABULARY))
        target, upstream = torch.zeros(9, device=DEVICE, dtype=torch.long), hidden[:, 0]
        bias = weight[:, 0]
        for function, more in (
            (_TokenLogProbs, (bias, target)),
            (_VocabParallel, (target, 0, None)),
        ):
            context = SimpleNamespace(save_for_backward=lambda *_: None)
            saved = []
            context.save_for_backward = lambda *tensors, saved=saved: saved.extend(tensors)
            function.forward(context, hidden, weight, *more)
            context.saved_tensors = tuple(saved)
            gradients = function.backward(context, upstream)
            assert [g.shape for g in gradients[:2]] == [hidden.shape, weight.shape]
        assert gpu.waits == []


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("RMSprop", torch.bfloat16), ("AdamW", torch.float16)]
)
def test_a_whole_step_runs_on_a_gpu(optimizer, dtype, tmp_path):
    """Scaled losses, clipping, the update, metrics; the first step of a run compares with DPO's
    loss at its beginning, which needs values."""
    config = settings(f"optimizer={optimizer}", "batch_size=5", "gradient_accumulation_steps=1")
    model = build("gpt_neox")
    pairs, known = given("dpo")
    order = Order(n_pairs=5, batch_size=5, n_epochs=2, n_examples=None, seed=0)
    found = Examples(order, dict(enumerate(pairs)), pairs, "")
    log = MetricLog(tmp_path, begin=None)
    with closing(log), fake_gpu() as gpu:
        objective = Objective(gpu.move(model), config.loss, dtype, BUDGET)
        trainer = Trainer(config, "preference", objective, found, known, log)
        trainer.position.steps = 1
        # what goes on from a checkpoint is to be the same
        assert trainer._repeats()
        trainer.train_step(pairs)
        trainer._evaluate()
        assert trainer.position.trained == 5
        assert all(
            value.is_cuda or name == "step"
            for state in trainer.optimizer.state.values()
            for name, value in state.items()
        )


def test_pairs_are_scored_on_a_gpu():
    model = build("llama")
    with fake_gpu() as gpu:
        found = score(gpu.move(model), examples(LENGTHS), dtype=torch.bfloat16, token_budget=BUDGET)
    assert [[len(values) for values in pair] for pair in found] == [[c, r] for _, c, r in LENGTHS]


@pytest.mark.parametrize(("name", "temperature"), [("gpt_neox", 0.0), ("llama", 1.0)])
def test_prompts_are_answered_on_a_gpu(name, temperature):
    model = build(name)
    tokenizer = SimpleNamespace(eos_token_id=0)
    with fake_gpu() as gpu:
        gpu.move(model)
        answers = answer(
            *(model, tokenizer, [[5, 6, 7], [8, 9]]),
            **{"max_new_tokens": 4, "temperature": temperature, "top_p": 0.9},
        )
    assert [len(one.ids) for one in answers] == [4, 4]


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_layers_on_two_gpus_get_what_they_need(kernels, monkeypatch):
    """And at no time is the whole model on one of them."""
    model = build("llama")
    apply_kernels(model, kernels, device="cuda")
    devices = [DEVICE, torch.device("cuda", 1)]
    monkeypatch.setattr(type(model), "to", lambda *_: pytest.fail("all of it on one GPU"))
    with fake_gpu() as gpu:
        gpu.move(model, torch.device("cpu"))
        spread_layers(model, list(model.model.layers), devices)
        places = [next(layer.parameters()).device for layer in model.model.layers]
        assert places == devices
        assert model.lm_head.weight.device == model.model.norm.weight.device == DEVICE
        assert accumulated(gpu, model, settings()) == (0, 4)


def test_layers_on_two_gpus_keep_the_kernels_that_a_plan_counts(monkeypatch):
    """They choose by the device of what they are given."""
    loaded = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        stage, "load_for_training", lambda model, *_: loaded.append(model) or (None, None)
    )
    monkeypatch.setattr(stage, "find_blocks", lambda *_: [])
    monkeypatch.setattr(stage, "spread_layers", lambda *_: None)
    stage._load(settings(), None, "cuda")
    assert [model.kernels for model in loaded] == ["auto"]
