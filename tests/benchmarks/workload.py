"""What every contender of the training benchmark gets: the same weights, pairs and order of steps.

``gpt_neox_17m``: 17.3 M parameters, 6 layers of width 256, output weights tied to the embeddings of
SmolLM2's 49,152 tokens; random weights, one seed. ``smollm2``: SmolLM2-135M-Instruct.
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
from dpo.config.places import builtin
from dpo.config.schema import RunConfig
from dpo.data.tokenize import Limits, TokenizedExample, load_tokenizer, tokenize_pair
from dpo.modeling.kernels import apply_kernels
from dpo.modeling.load import load_model
from dpo.modeling.obtain import obtain

MODELS = ("gpt_neox_17m", "smollm2")
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

    @property
    def name(self) -> str:
        """As it stands in the results."""
        return f"{self.model}/{self.dtype}"

    def as_json(self) -> str:
        """For the command line of a contender."""
        return json.dumps(asdict(self))


@cache
def model_folder(name: str) -> Path:
    """The folder that tokenizer and weights come from; downloads SmolLM2 the first time."""
    return obtain(compose(["model=smollm2"]).config.model)


def load(name: str, seed: int = 0, kernels: str = "auto") -> Any:
    """The model with float32 weights; ``plain`` as transformers runs it."""
    if name == "smollm2":
        return load_model(model_folder(name), torch.float32, kernels=kernels)
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
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
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    apply_kernels(model, kernels)
    return model


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
        ]
    ).config
