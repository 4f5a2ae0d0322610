"""Floating-point operations of a pair, and the time that they take.

Notation: p, c, r tokens of prompt, chosen and rejected response; M weights of all blocks that
multiply every token (two operations each, forward; of experts, those that a token passes); V, D
vocabulary and hidden size; L blocks, H query width.

A pair with the prompt shared passes p + c + r tokens; unshared it passes (p + c) + (p + r); padded,
every sequence is as long as the longest of its batch.

    matrices   2 M          x tokens
    attention  4 L H        x (query, key) pairs: p(p+1)/2, then c p + c(c+1)/2 and the same for r
    head       2 V D        x response tokens (c + r): log-probs are taken there only

Forward counts once; backward twice, or once for weights that are frozen (LoRA). The head is
computed once more in backward instead of being kept, and with activation checkpointing so are the
blocks.
At 130/80/80 tokens that is 4.58 TFLOP for Pythia-2.8B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo.plan.lengths import Lengths
from dpo.plan.shape import Architecture

Layout = Literal["shared", "unshared", "padded"]

PEAK_TFLOPS = {
    "A10": 125.0,
    "A100": 312.0,
    "B200": 2250.0,
    "H100": 989.0,
    "H200": 989.0,
    "L4": 121.0,
    "L40S": 362.0,
    "T4": 65.0,
    "V100": 125.0,
}
"""Dense 16-bit products with tensor cores, as the makers state them."""
FLOAT32_TFLOPS = {
    "A10": 31.2,
    "A100": 19.5,
    "B200": 75.0,
    "H100": 67.0,
    "H200": 67.0,
    "L4": 30.3,
    "L40S": 91.6,
    "T4": 8.1,
    "V100": 15.7,
}
"""Products in float32, likewise: without tensor cores, since torch leaves TF32 off."""
MEMORY_GIB = {
    "A10": 22.5,
    "A100": 79.2,
    "B200": 178.0,
    "H100": 79.2,
    "H200": 139.8,
    "L4": 22.2,
    "L40S": 44.5,
    "T4": 14.6,
    "V100": 31.7,
}
"""Memory that a program sees on the largest common model of each."""
WITHOUT_BFLOAT16 = ("T4", "V100")
"""On these ``model.compute_dtype=auto`` multiplies in float32."""
DEFAULT_GPU = "A100"
DEFAULT_UTILISATION = 0.25
"""Share of the peak that training reaches, over the operations above. Published runs of preference
training reach 2 to 25 %, pretraining of 8 B models 33 to 39 %."""


@dataclass(frozen=True)
class Flops:
    """Operations of one example."""

    forward: float
    training: float
    """Forward, backward and what is computed again."""


def flops(
    shape: Architecture,
    lengths: Lengths,
    *,
    recomputed_share: float = 0.0,
    frozen: bool = False,
    layout: Layout = "shared",
) -> Flops:
    """Operations of one pair, or of one SFT example where ``lengths.rejected`` is 0.

    Args:
        shape: The model.
        lengths: Mean lengths, in tokens.
        recomputed_share: Share of the blocks whose forward pass is done again in backward.
        frozen: Only adapters are trained.
        layout: How sequences lie in a batch.
    """
    p, responses = lengths.prompt, lengths.responses
    if layout == "padded":
        longest = lengths.padded or max(p + length for length in responses)
        n_tokens, attended = longest * len(responses), len(responses) * _causal(longest)
        n_head = n_tokens
    else:
        shared = layout == "shared"
        n_tokens = sum(responses) + p * (1 if shared else len(responses))
        attended = sum(length * p + _causal(length) for length in responses)
        attended += _causal(p) * (1 if shared else len(responses))
        n_head = sum(responses)
    matrices = 2.0 * shape.n_layers * shape.active_matrices * n_tokens
    attention = 4.0 * shape.n_layers * shape.query_width * attended
    head = 2.0 * shape.vocabulary * shape.width * n_head
    blocks = matrices + attention
    backward = blocks + head if frozen else 2 * (blocks + head)
    # the padded layout is that of programs that keep the logits
    again = recomputed_share * blocks + (0.0 if layout == "padded" else head)
    return Flops(forward=blocks + head, training=blocks + head + backward + again)


def _causal(length: float) -> float:
    return length * (length + 1) / 2


def seconds(operations: float, *, gpus: int, peak_tflops: float, utilisation: float) -> float:
    """How long ``operations`` take on all GPUs together."""
    return operations / (gpus * peak_tflops * 1e12 * utilisation)
