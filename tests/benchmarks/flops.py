"""Model FLOP/s of a step, and the most that this machine reaches.

A step's model FLOPs count every token that differs once, forward and backward, and nothing that is
computed again:

    6 x (tokens x P + responses x V x D) + 12 x L x A x D_heads

``tokens``: prompt, chosen and rejected tokens of the step, each prompt counted once. ``P``: weights
of all matrices in the blocks. ``responses``: response tokens, each a product with the V x D output
weights. ``A``: (query, key) pairs inside the causal masks, which for a prompt of p tokens and
responses of r are p (p + 1) / 2 + sum of r p + r (r + 1) / 2; L layers, D_heads = heads x head
size. 6 = 2 FLOPs a weight, once forward and twice backward; 12 = the same for two products.

The peak is the fastest of square products from 1024 to 4096 (8192 on a GPU) and of the model's own
shapes, each the best of several tries, in the same type and with the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from dpo.data.tokenize import TokenizedExample

SQUARES = (1024, 2048, 4096)
_TRIES = 5


def step_flops(model: Any, examples: Sequence[TokenizedExample]) -> float:
    """Model FLOPs of one optimiser step on ``examples``."""
    config = model.config
    tied = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    in_blocks = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tied)
    n_output = model.get_output_embeddings().weight.numel()
    n_tokens = sum(example.n_tokens for example in examples)
    n_responses = sum(len(response) for e in examples for response in e.responses)
    seen = 0.0
    for example in examples:
        prompt = len(example.prompt_T)
        seen += prompt * (prompt + 1) / 2
        seen += sum(len(r) * prompt + len(r) * (len(r) + 1) / 2 for r in example.responses)
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    attention = 12 * config.num_hidden_layers * seen * config.num_attention_heads * head_size
    return 6.0 * (n_tokens * in_blocks + n_responses * n_output) + attention


def peak_flops_per_second(model: Any, dtype: torch.dtype, n_tokens: int = 2048) -> float:
    """The fastest product that was found."""
    device = model.device
    squares = (*SQUARES, 8192) if device.type == "cuda" else SQUARES
    shapes = {(size, size, size) for size in squares}
    for parameter in model.parameters():
        if parameter.dim() == 2:
            shapes.add((n_tokens, parameter.shape[1], min(parameter.shape[0], 8192)))
    return max(_speed(*shape, dtype, device) for shape in shapes)


def _speed(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(_TRIES):
        wait()
        start = time.perf_counter()
        left @ right.t()
        wait()
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * inner * columns / best
