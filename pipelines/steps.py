"""Names of the pipeline's steps, and how a task's name tells its step."""

from __future__ import annotations

import re

STEPS = (
    "fingerprint",
    "ingest",
    "sft",
    "reference",
    "preference",
    "evaluate",
    "gate",
    "publish",
    "finish",
)
"""Task names, in the order in which they run."""
SELECT = "select"
"""The task that a sweep has besides."""


def step_of(task: str) -> str:
    """The step behind a task's name: evaluate of a sweep's ``evaluate-2``, ingest of its shards."""
    return re.sub(r"-(\d+|shard)$", "", task)
