"""What every contender of the training benchmark gets: the same weights, pairs and order of steps.

``gpt_neox_17m``: 17.3 M parameters, 6 layers of width 256, output weights tied to the embeddings of
SmolLM2's 49,152 tokens; random weights, one seed. ``smollm2``: SmolLM2-135M-Instruct. ``llama_1b``:
1.17 B parameters in the shape of TinyLlama (22 layers of width 2048) with SmolLM2's tokens; random
weights, for GPUs.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo.config.compose import compose
from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.config.schema import RunConfig
from dpo.data.tokenize import Limits, TokenizedExample, load_tokenizer, tokenize_pair
from dpo.modeling.kernels import apply_kernels
from dpo.modeling.load import load_model
from dpo.modeling.obtain import obtain

MODELS = ("gpt_neox_17m", "smollm2")
GPU_MODELS = ("smollm2", "llama_1b")
DTYPES = ("float32", "bfloat16")
BETA = 0.1
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 10.0
LIMITS = Limits(max_length=512, max_prompt_length=256, truncation_mode="keep_end")


@dataclass(frozen=True)
class Case:
    """One measurement; every contender is run in a process of its own with it."""

    model: str
    dtype: str
    steps: int
    """Optimiser steps that are timed."""
    warmup: int = 1
    """Steps before them that are not."""
    batch: int = 8
    threads: int = 2
    seed: int = 0
    token_budget: int = 0
    """Ours: tokens of a micro-batch; 0 takes the default of ``micro_batch_tokens``."""
    peer_batch: int = 0
    """The peers: pairs of a micro-batch, where a step's do not fit at once; 0 takes all."""
    device: str = "cpu"
    settings: tuple[str, ...] = ()
    """Ours: further settings."""

    @property
    def name(self) -> str:
        """As it stands in the results."""
        place = "" if self.device == "cpu" else f"/{self.device}"
        return f"{self.model}/{self.dtype}{place}"

    @property
    def at_once(self) -> int:
        """Pairs that a peer takes at once."""
        return self.peer_batch or self.batch

    def as_json(self) -> str:
        """For the command line of a contender."""
        return json.dumps(asdict(self))


@cache
def model_folder(name: str) -> Path:
    """The folder that tokenizer and weights come from; downloads SmolLM2 the first time."""
    return obtain(compose(["model=smollm2"]).config.model)


def load(case: Case, model: ModelConfig | None = None) -> Any:
    """The model with float32 weights, on the case's device; as transformers runs it without
    ``model``'s settings."""
    kernels = model.kernels if model else "plain"
    compiled = bool(model and model.compile)
    if case.model == "smollm2":
        folder = model_folder(case.model)
        options = {"device": case.device, "kernels": kernels, "compiled": compiled}
        return load_model(folder, torch.float32, **options)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(case.seed)
    with torch.device(case.device):
        made = AutoModelForCausalLM.from_config(_shape(case.model), attn_implementation="sdpa")
    apply_kernels(made.eval(), kernels, compiled=compiled)
    return made


def _shape(name: str) -> Any:
    from transformers import GPTNeoXConfig, LlamaConfig

    if name == "llama_1b":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=2048,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            intermediate_size=5632,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
        )
    return GPTNeoXConfig(
        vocab_size=49152,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def tokenizer_of(name: str) -> Any:
    """The tokenizer of both models."""
    return load_tokenizer(model_folder(name))


def pairs(name: str, n_pairs: int, seed: int = 0) -> list[TokenizedExample]:
    """HH pairs in random order, tokenised as this project does it."""
    packaged = builtin("builtin:hh-harmless")
    assert packaged is not None
    rows = [json.loads(line) for line in gzip.decompress(packaged.read_bytes()).splitlines()]
    tokenizer = tokenizer_of(name)
    found: list[TokenizedExample] = []
    for index in np.random.default_rng(seed).permutation(len(rows)):
        prompt, chosen, rejected = _split(rows[index])
        if not prompt:
            continue
        texts = [chosen, rejected]
        found.append(tokenize_pair(prompt, texts, tokenizer, LIMITS, pair_id=str(len(found))))
        if len(found) == n_pairs:
            return found
    raise ValueError(f"there are only {len(found)} pairs: ask for fewer steps")


def _split(row: dict[str, str]) -> tuple[str, str, str]:
    mark = "\n\nAssistant:"
    end = row["chosen"].rfind(mark) + len(mark)
    prompt = row["chosen"][:end]
    if not row["rejected"].startswith(prompt):
        return "", "", ""
    return prompt, row["chosen"][end:], row["rejected"][end:]


def config_of(case: Case) -> RunConfig:
    """Our settings of a case: what it leaves open takes its default."""
    return compose(
        [
            f"batch_size={case.batch}",
            f"lr={LEARNING_RATE}",
            "optimizer=AdamW",
            "warmup_steps=0",
            f"loss.beta={BETA}",
            f"max_grad_norm={MAX_GRAD_NORM}",
            f"model.compute_dtype={case.dtype}",
            *([f"micro_batch_tokens={case.token_budget}"] if case.token_budget else []),
            *case.settings,
        ]
    ).config
