"""A small data set with one plain preference, to try the service and training out.

The chosen answer of every pair is courteous and the rejected one is not, so even a tiny model
learns to tell them apart in seconds.
"""

from __future__ import annotations

from itertools import product
from typing import TypedDict

SETTINGS = {
    "model": "tiny",
    "max_length": 96,
    "max_prompt_length": 48,
    "sft_n_examples": 32,
    "sft_lr": 1e-3,
    "preference_n_examples": 96,
    "preference_lr": 1e-3,
    "evaluate_n_samples": 2,
}
"""Pipeline parameters with which these pairs train a published model in half a minute."""

_TASKS = (
    "find the museum",
    "mend a bicycle",
    "bake rye bread",
    "learn the violin",
    "renew a passport",
    "grow tomatoes",
    "read a bus map",
    "wash a woollen coat",
    "write to the landlord",
    "choose a kettle",
)
_OPENINGS = (
    "How do I {task}?",
    "Can you help me {task}?",
    "I would like to {task}.",
    "What is the first step to {task}?",
    "My neighbour wants to {task}. What should I tell her?",
    "Is it hard to {task}?",
    "Who could teach me to {task}?",
    "How long does it take to {task}?",
)


class Row(TypedDict):
    """A preference as the service takes it."""

    prompt: str
    chosen: str
    rejected: str


def rows() -> list[Row]:
    """Eighty pairs, always the same."""
    return [
        Row(
            prompt=f"\n\nHuman: {opening.format(task=task)}\n\nAssistant:",
            chosen=f" Gladly! Here is a good way to {task}.",
            rejected=f" No. Find out yourself how to {task}.",
        )
        for opening, task in product(_OPENINGS, _TASKS)
    ]
