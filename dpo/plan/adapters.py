"""Weights of a LoRA adapter on every linear layer of every block."""

from __future__ import annotations

from dpo.plan.shape import Architecture, Experts, Matrices


def lora_parameters(shape: Architecture, rank: int) -> int:
    """How many weights an adapter has.

    All experts of a block are one tensor in transformers, no linear layer: they get no adapter,
    but where peft takes the names of other MLPs for theirs. Then the others get none.
    """
    attention = shape.n_layers * _of_rank_one(shape.attention)
    experts = shape.experts
    if experts is None:
        return rank * (attention + shape.n_layers * _of_rank_one(shape.mlp))
    if experts.adapted:
        return rank * (attention + experts.n_blocks * experts.count * _of_an_expert(experts))
    shared = experts.n_blocks * _of_rank_one(experts.shared[1:])
    plain = (shape.n_layers - experts.n_blocks) * _of_rank_one(shape.mlp)
    return rank * (attention + shared + plain)


def _of_rank_one(matrices: Matrices) -> int:
    return sum(map(sum, matrices))


def _of_an_expert(experts: Experts) -> int:
    """Gate and first matrix are one, with an adapter of twice the rank."""
    width, mlp_width = experts.each[0]
    return 2 * (width + 2 * mlp_width) + mlp_width + width
