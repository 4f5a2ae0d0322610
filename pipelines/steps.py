"""Names of the pipeline's steps, and how a task's name tells its step."""

from __future__ import annotations

import re
from typing import Literal, get_args

Step = Literal[
    "fingerprint",
    "ingest",
    "sft",
    "reference",
    "preference",
    "evaluate",
    "select",
    "gate",
    "publish",
    "finish",
]
"""A task's name."""
TASKS: tuple[str, ...] = get_args(Step)
"""All of them, in the order in which they run."""
SELECT = "select"
"""The task that a sweep has besides."""
STEPS = tuple(task for task in TASKS if task != SELECT)
"""The tasks of a run without a sweep."""


def step_of(task: str) -> str:
    """The step behind a task's name: evaluate of a sweep's ``evaluate-2``, ingest of its shards."""
    return re.sub(r"-(\d+|shard)$", "", task)
