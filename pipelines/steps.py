"""Names of the pipeline's steps, and how a task's name tells its step."""

from __future__ import annotations

import re
from typing import Literal, get_args

PIPELINE = "preference-fine-tuning"
"""The name of our packages, and of the experiment where none is named."""
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
SWEPT = ("preference", "evaluate")
"""The tasks that a sweep has once for each candidate."""
STEPS = tuple(task for task in TASKS if task != SELECT)
"""The tasks of a run without a sweep."""

DISPLAY_NAMES: dict[str, str] = {
    "fingerprint": "Check and plan",
    "ingest": "Ingest and validate",
    "sft": "Supervised fine-tuning (SFT)",
    "reference": "Reference log-probabilities",
    "preference": "Preference training",
    "evaluate": "Evaluate",
    "select": "Select the best candidate",
    "gate": "Gate",
    "publish": "Publish",
    "finish": "Record the run",
}
"""What the graph of the Kubeflow UI calls each step."""
_SHOWN = {shown: step for step, shown in DISPLAY_NAMES.items()}


def step_of(task: str) -> str:
    """The step behind a task's name: evaluate of a sweep's ``evaluate-2``, ingest of its shards.

    A display name tells its step as well.
    """
    return _SHOWN.get(task) or re.sub(r"-(\d+|shard)$", "", task)
