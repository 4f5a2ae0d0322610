"""Activations that are made again in the backward pass, for memory.

Not with transformers' own switch: it knows nothing of packed rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from dpo.errors import ConfigError
from dpo.modeling.attention import NAME as PACKED
from dpo.modeling.attention import packed_attention
from dpo.modeling.blocks import find_blocks


def checkpoint_activations(model: Any, mode: str, block_name: str | None = None) -> None:
    """Recompute the activations of every block (``full``) or of every second one in backward.

    Args:
        model: A causal language model of transformers.
        mode: As ``activation_checkpointing``.
        block_name: As ``model.block_name``.

    Raises:
        ModelError: it has no blocks of that name.
        ConfigError: it does not say what its blocks are.
    """
    if mode == "none":
        return
    blocks = find_blocks(model, block_name)
    if not blocks:
        raise ConfigError(
            f"{model.config.model_type} models do not say which of their modules are blocks: no "
            "activations would be made again",
            where=f"activation_checkpointing={mode}",
            fix="set model.block_name to the class of a block, or activation_checkpointing=none",
        )
    for number, block in enumerate(blocks):
        if mode == "full" or number % 2 == 0:
            block.forward = _recomputed(model, block.forward)


def _recomputed(model: Any, forward: Any) -> Any:
    """``forward`` with its activations made again in backward, through the same attention.

    The backward pass begins after ``packed_attention`` has ended: without this it would recompute
    with transformers' attention, which knows nothing of shared prompts.
    """
    from torch.utils.checkpoint import checkpoint

    def run(*arguments: Any, **named: Any) -> Any:
        packed = model.config._attn_implementation == PACKED

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), packed_attention(model) if packed else nullcontext()

        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return run
