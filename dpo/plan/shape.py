"""The sizes of a decoder-only model, and what they make: parameters and matrices."""

from __future__ import annotations

from dataclasses import dataclass

from dpo.errors import ConfigError

Matrices = tuple[tuple[int, int], ...]
"""Rows and columns of matrices, each with how many weights it has: rows x columns."""


def weights_of(matrices: Matrices) -> int:
    """How many weights matrices have together."""
    return sum(rows * columns for rows, columns in matrices)


@dataclass(frozen=True)
class Experts:
    """MLPs of a block of which a router chooses for each token."""

    each: Matrices
    """Matrices of one expert."""
    biases: int
    """Of one expert."""
    count: int
    active: int
    """Experts that a token passes."""
    shared: Matrices
    """Matrices that every token passes beside them, and the router."""
    n_blocks: int
    """Blocks that have experts; the others have one MLP."""
    adapted: bool
    """LoRA adds to the experts, and not to other MLPs."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model; all are counts."""

    model_type: str
    n_layers: int
    width: int
    """Hidden size."""
    n_heads: int
    n_kv_heads: int
    head_size: int
    mlp_width: int
    """Of the MLP that a token passes; with experts, of all that it passes together."""
    gated: bool
    """The MLP has a gate: three matrices instead of two."""
    vocabulary: int
    """Rows of the embeddings."""
    context: int
    """Longest sequence, in tokens; 0 where the configuration states none."""
    attention: Matrices
    mlp: Matrices
    """Of a block without experts."""
    vectors: int
    """Biases and norms of a block without experts."""
    embedding_parameters: int
    """Input and output embeddings, learned positions, last norm: what is outside of the blocks."""
    experts: Experts | None
    known: bool
    """Whether ``kinds`` knows this ``model_type``: parameters are right within 1 %."""

    @property
    def query_width(self) -> int:
        """Width of the queries."""
        return self.n_heads * self.head_size

    @property
    def block_parameters(self) -> int:
        """All weights of one block, the largest."""
        return max(self._plain_block, self._expert_block)

    @property
    def block_matrices(self) -> int:
        """Weights of the largest block's matrices."""
        experts = self.experts
        found = weights_of(self.attention)
        if experts is None:
            return found + weights_of(self.mlp)
        return found + weights_of(experts.shared) + experts.count * weights_of(experts.each)

    @property
    def active_matrices(self) -> float:
        """Weights that multiply every token, of a block in the mean."""
        found = weights_of(self.attention)
        experts = self.experts
        if experts is None:
            return found + weights_of(self.mlp)
        chosen = weights_of(experts.shared) + experts.active * weights_of(experts.each)
        share = experts.n_blocks / self.n_layers
        return found + share * chosen + (1 - share) * weights_of(self.mlp)

    @property
    def matrices(self) -> int:
        """Weights of the matrices of all blocks."""
        n_expert_blocks = self.experts.n_blocks if self.experts else 0
        plain = weights_of(self.attention) + weights_of(self.mlp)
        return n_expert_blocks * self.block_matrices + (self.n_layers - n_expert_blocks) * plain

    @property
    def parameters(self) -> int:
        """All weights."""
        n_expert_blocks = self.experts.n_blocks if self.experts else 0
        blocks = n_expert_blocks * self._expert_block
        blocks += (self.n_layers - n_expert_blocks) * self._plain_block
        return blocks + self.embedding_parameters

    @property
    def _plain_block(self) -> int:
        return weights_of(self.attention) + weights_of(self.mlp) + self.vectors

    @property
    def _expert_block(self) -> int:
        if self.experts is None:
            return 0
        return self.block_matrices + self.vectors + self.experts.count * self.experts.biases


def check_length(shape: Architecture, max_length: int) -> None:
    """Refuse examples longer than the model's context, as training does.

    Raises:
        ConfigError: ``max_length`` exceeds it.
    """
    if 0 < shape.context < max_length:
        raise ConfigError(
            f"max_length is {max_length}, the model's context {shape.context} tokens",
            where="max_length",
            fix=f"set max_length to at most {shape.context} (and max_prompt_length below it)",
        )
