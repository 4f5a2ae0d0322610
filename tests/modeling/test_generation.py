"""Answers in batches are those of each prompt alone, for architectures of every kind."""

import json
import subprocess
import sys

import pytest
import torch

from dpo.config.models import ModelConfig
from dpo.errors import ModelError
from dpo.evaluate.answers import repetition
from dpo.modeling.generation import Answer, answer, decode, generate
from dpo.modeling.sampler import Sampler
from tests.modeling.architectures import HYBRID, random_model

SIZES = {"vocab_size": 100, "max_position_embeddings": 64}
SMALL = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT = {"vocab_size": 100, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
ENDS = {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
ARCHITECTURES = {
    "gpt2": GPT,  # a vector for each position
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neox": SMALL,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 8},
    "opt": {
        **SIZES,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},  # ALiBi
    "gpt_neo": {
        **SIZES,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "mpt": {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    # linear attention with a cache of its own kind
    "minimax": {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "mamba": {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    # a cache of states alone, with no length to ask for; then one of both kinds
    "recurrent_gemma": GROUPED,
    "granitemoehybrid": {**GROUPED, **HYBRID},
}


class Tokenizer:
    eos_token_id = 0


def model_of(name):
    model = random_model(name, {**ARCHITECTURES[name], **ENDS})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # weights as small as at the start would give every prompt the same answer
            parameter.data.mul_(3)
    return model


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 100, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = prompts_of(3, 11, 7, 1, 20, 7)


@torch.no_grad()
def plainly(model, prompt, n):
    """Greedy, without a cache, without padding, one prompt at a time."""
    ids = list(prompt)
    for _ in range(n):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_gives_what_each_prompt_gives_alone(name):
    model = model_of(name)
    found = answer(model, Tokenizer, PROMPTS, max_new_tokens=12, batch_size=6)
    assert [item.ids for item in found] == [plainly(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(item.ids) for item in found}) > 1


def test_where_the_rotation_turns_a_batch_gives_what_each_prompt_gives_alone():
    """LongRoPE has other factors from the 17th token on, and transformers turns a whole batch.

    Of the prompts some stay below, some begin beyond, and three pass it in their answer.
    """
    turning = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [9.0, 30.0, 60.0, 90.0],
        "factor": 4.0,
    }
    # Phi-3's own setting of the length goes before one in rope_parameters
    turning_at = {"original_max_position_embeddings": 16, "rope_parameters": turning}
    model = random_model("phi3", {**GROUPED, **ENDS, **turning_at})
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    prompts = prompts_of(3, 11, 4, 20, 1, 11, 25, 16)
    expected = [plainly(model, prompt, 12) for prompt in prompts]
    found = answer(model, Tokenizer, prompts, max_new_tokens=12, batch_size=8)
    assert [item.ids for item in found] == expected
    assert len({tuple(ids) for ids in expected}) == len(prompts)


def test_states_that_layers_keep_themselves_are_those_of_one_prompt():
    """RecurrentGemma's third layer is of attention: a cache with a length, beside such states."""
    settings = {**ARCHITECTURES["recurrent_gemma"], "num_hidden_layers": 3, **ENDS}
    model = random_model("recurrent_gemma", settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    found = answer(model, Tokenizer, PROMPTS, max_new_tokens=12, batch_size=6)
    assert [item.ids for item in found] == [plainly(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sampled_answers_depend_neither_on_the_batch_nor_on_the_others(name):
    model = model_of(name)
    how = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = answer(model, Tokenizer, PROMPTS, batch_size=6, **how)
    by_two = answer(model, Tokenizer, PROMPTS, batch_size=2, **how)
    assert [item.ids for item in together] == [item.ids for item in by_two]
    other = answer(model, Tokenizer, PROMPTS, batch_size=6, **{**how, "seed": 4})
    assert [item.ids for item in together] != [item.ids for item in other]


def test_the_global_random_state_is_left_alone():
    model = model_of("gpt2")
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    answer(model, Tokenizer, PROMPTS[:2], max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.rand(2), expected)


def sampler(top_p, n):
    streams = [torch.Generator().manual_seed(i) for i in range(n)]
    return Sampler(1.0, top_p, streams)


def test_samples_follow_the_distribution():
    chances = torch.tensor([0.5, 0.3, 0.2])
    drawn = sampler(1.0, 6000).choose(chances.log().expand(6000, 3))
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 6000
    assert torch.allclose(shares, chances, atol=0.03)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    """0.5 + 0.3 reach 0.7, so the third token is never drawn, and the others 5 : 3."""
    chances = torch.tensor([0.2, 0.5, 0.3])
    drawn = sampler(0.7, 4000).choose(chances.log().expand(4000, 3))
    counts = torch.bincount(torch.tensor(drawn), minlength=3)
    assert counts[0] == 0
    assert float(counts[1] / 4000) == pytest.approx(5 / 8, abs=0.03)


def test_a_tiny_nucleus_is_greedy():
    drawn = sampler(1e-9, 50).choose(torch.tensor([0.2, 0.5, 0.3]).log().expand(50, 3))
    assert drawn == [1] * 50


class Config:
    max_position_embeddings = 64

    def get_text_config(self):
        return self


class Ending(torch.nn.Module):
    """Says 5 after each prompt token count n until n tokens, then ends: a countdown by prompt."""

    def __init__(self, other=None):
        super().__init__()
        self.other = other
        """What it says instead after three times 5."""
        self.config = Config()
        self.device = torch.device("cpu")
        self.sizes = []

    def forward(self, input_ids, attention_mask):
        self.sizes.append(len(input_ids))
        logits = torch.zeros(*input_ids.shape, 100)
        for row, ids in enumerate(input_ids.tolist()):
            said = sum(token == 5 for token in ids)
            says = self.other if self.other and said == 3 else 5
            logits[row, -1, 0 if said >= ids[0] - 10 else says] = 1.0
        return type("Output", (), {"logits": logits})()


def test_rows_that_have_ended_leave_the_batch():
    model = Ending()
    found = answer(model, Tokenizer, [[11], [12], [16]], max_new_tokens=10)
    assert [item.ids for item in found] == [[5, 0], [5, 5, 0], [5] * 6 + [0]]
    assert all(item.ended for item in found)
    assert model.sizes == [3, 3, 2, 1, 1, 1, 1]


class Crowded(Ending):
    """Has memory for two rows."""

    def forward(self, input_ids, attention_mask):
        if len(input_ids) > 2:
            self.sizes.append(-len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(input_ids, attention_mask)


def test_batches_become_smaller_where_memory_is_short():
    """Five rows do not fit, nor three; the later batches are not tried at the old size again."""
    prompts = [[11], [12], [11], [13], [11], [12], [11], [11], [11]]
    told = []
    model = Crowded()
    found = answer(model, Tokenizer, prompts, max_new_tokens=9, batch_size=5, advance=told.append)
    assert [len(item.ids) for item in found] == [prompt[0] - 9 for prompt in prompts]
    assert [size for size in model.sizes if size < 0] == [-5, -3]
    assert sum(told) == 9
    assert max(told) == 2


def test_one_row_that_does_not_fit_is_an_error():
    class Full(Ending):
        def forward(self, input_ids, attention_mask):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        answer(Full(), Tokenizer, [[11], [12], [13]], max_new_tokens=2)


def test_an_answer_stops_where_the_context_ends():
    model = model_of("gpt2")
    (found,) = answer(model, Tokenizer, prompts_of(60), max_new_tokens=50)
    assert len(found.ids) <= 4


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neo", "mpt"])
def test_no_answer_is_cut_by_the_length_of_a_prompt_beside_it(name):
    """A context of 64: 62 and 58 tokens leave room for 2 and 6, the others for all 12."""
    model, prompts = model_of(name), prompts_of(5, 62, 10, 58, 52, 58)
    rooms = (12, 2, 12, 6, 12, 6)
    expected = [plainly(model, prompt, n) for prompt, n in zip(prompts, rooms, strict=True)]
    assert max(map(len, expected)) > 6
    for size in (1, 6):
        found = answer(model, Tokenizer, prompts, max_new_tokens=12, batch_size=size)
        assert [item.ids for item in found] == expected


def test_a_prompt_that_fills_the_context_loses_its_beginning():
    model = model_of("gpt2")
    (long,) = prompts_of(80)
    found = answer(model, Tokenizer, [long, long[-64:]], max_new_tokens=5)
    assert [item.prompt_ids for item in found] == [long[-63:]] * 2
    assert found[0].ids == found[1].ids == plainly(model, long[-63:], 1)


@pytest.mark.parametrize("ends", [[0, 7], 7, None])
def test_an_answer_ends_at_any_end_token_of_the_generation_config(ends):
    """The first prompt's answer would end itself with 0 after two tokens: 5 5 0."""
    model = Ending(other=7)
    model.generation_config = type("Config", (), {"eos_token_id": ends})()
    found = answer(model, Tokenizer, [[12], [40]], max_new_tokens=6)
    assert found[0] == Answer([12], [5, 5, 0], ended=True)
    assert found[1] == Answer([40], [5, 5, 5, *([7] if ends else [7] * 3)], ended=bool(ends))


def test_the_text_of_an_answer_leaves_out_the_token_that_ended_it():
    class Words:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    assert decode(Words(), Answer([1], [5, 7], ended=True)) == "5"
    assert decode(Words(), Answer([1], [5, 7], ended=False)) == "5 7"


def test_an_answer_that_was_cut_off_says_so():
    (found,) = answer(Ending(), Tokenizer, [[40]], max_new_tokens=3)
    assert found == Answer([40], [5, 5, 5], ended=False)


def test_nan_ends_in_a_message():
    model = model_of("gpt2")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        answer(model, Tokenizer, PROMPTS[:1], max_new_tokens=2)


def test_prompts_are_cut_to_their_end_and_may_be_empty():
    from dpo.modeling.load import load_for_training

    model, tokenizer = load_for_training(ModelConfig(), None)
    texts = ["", "a b c d e f g h", "\n\nHuman: hi\n\nAssistant:"]
    found = generate(model, tokenizer, texts, max_new_tokens=4, max_prompt_length=3)
    assert len(found) == 3
    ids = tokenizer(texts[1], add_special_tokens=False)["input_ids"][-3:]
    (alone,) = answer(model, tokenizer, [ids], max_new_tokens=4)
    assert found[1] == decode(tokenizer, alone)


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([1] * 8, 0.8), ([1, 2, 3, 4] * 2, 0.2)],
)
def test_repetition_by_hand(ids, share):
    """Eight equal tokens hold five 4-grams, all the same: 1 - 1/5. 1234 twice: one of five."""
    assert repetition(ids) == pytest.approx(share)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_two_processes_answer_as_one_and_do_not_hang(kind, tmp_path):
    from tests.modeling.sharded_generation import HOW

    file = tmp_path / "answers.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "tests.modeling.sharded_generation", kind, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = answer(model_of("llama"), Tokenizer, PROMPTS, **HOW)
    assert json.loads(file.read_text()) == [item.ids for item in alone]
