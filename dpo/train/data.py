"""The training and held-out examples of a run, tokenised, in the order in which it sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.data.loader import Order, evaluation_indices, weighted
from dpo.data.parquet import Pairs, read_pairs
from dpo.data.schema import TEST, TRAIN
from dpo.data.tokenize import Limits, TokenizedExample
from dpo.data.tokens import tokenize_rows
from dpo.errors import DataError


@dataclass(frozen=True)
class Examples:
    """What a run trains on and measures on."""

    order: Order
    train: dict[int, TokenizedExample]
    """By index in ``order``; only those that it reaches. A pair of a source with a weight above 1
    may be there more than once."""
    held_out: list[TokenizedExample]
    fingerprint: str
    """Content hash of the pairs."""
    chat_template: str | None = None
    """See ``Pairs.chat_template``."""

    def cut(self) -> str:
        """How much of the training pairs goes unseen; empty where nothing does."""
        unique = {example.pair_id: example for example in self.train.values()}.values()
        prompts = sum(example.prompt_is_cut for example in unique)
        responses = sum(example.a_response_is_cut for example in unique)
        if not prompts and not responses:
            return ""
        return (
            f"of {len(unique):,} training pairs, {prompts:,} are read with a shortened prompt and "
            f"{responses:,} with a shortened response"
        )


def load_examples(
    config: RunConfig, folder: Path, tokenizer: Any, *, batch_size: int, responses: str
) -> Examples:
    """Read and tokenise the pairs of an ingest output.

    Args:
        config: Settings of the run.
        folder: Output of ingest.
        tokenizer: The model's.
        batch_size: Examples of an optimiser step.
        responses: ``pair`` (chosen and rejected) or ``sft_target``.

    Raises:
        ArtifactError: the pairs are not those that ingest wrote.
        DataError: there is nothing to train on.
    """
    train, test = read_pairs(folder, TRAIN), read_pairs(folder, TEST)
    draws = weighted(train.rows, train.weights, config.seed)
    if not draws:
        raise DataError("there is no pair to train on", where=str(folder))
    order = Order(
        n_pairs=len(draws),
        batch_size=batch_size,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        seed=config.seed,
    )
    held_out = evaluation_indices(len(test.rows), config.n_eval_examples, config.seed)
    wanted = {index: draws[index] for index in order.indices()}
    rows = sorted(set(wanted.values()))
    tokenized = dict(zip(rows, _tokenize(config, train, rows, tokenizer, responses), strict=True))
    return Examples(
        order=order,
        train={index: tokenized[row] for index, row in wanted.items()},
        held_out=_tokenize(config, test, held_out, tokenizer, responses),
        fingerprint=train.content_hash,
        chat_template=train.chat_template,
    )


def _tokenize(
    config: RunConfig, pairs: Pairs, indices: list[int], tokenizer: Any, responses: str
) -> list[TokenizedExample]:
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    return tokenize_rows(pairs, indices, tokenizer, limits, responses=responses)
