"""Activations that are made again in the backward pass, for memory.

Not with transformers' own switch: it knows nothing of packed rows.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from dpo.modeling.attention import NAME as PACKED
from dpo.modeling.attention import packed_attention


def checkpoint_activations(model: Any, mode: str) -> None:
    """Recompute the activations of every block (``full``) or of every second one in backward."""
    if mode == "none":
        return
    for number, block in enumerate(blocks_of(model)):
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


def blocks_of(model: Any) -> list[Any]:
    """The transformer blocks of ``model``, as transformers names their class."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
