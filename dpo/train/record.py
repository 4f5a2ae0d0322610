"""What is written beside trained weights about how they came to be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, stage_settings
from dpo.modeling.precision import name_of
from dpo.train.data import Examples
from dpo.train.trainer import NLL_PER_TOKEN, Trainer


def details_of(trainer: Trainer) -> dict[str, Any]:
    """What a finished training tells of itself, in its manifest and ``run.json``."""
    # others are of a model before its last steps
    evaluation = trainer.position.evaluation if trainer.config.do_last_eval else {}
    details: dict[str, Any] = {
        "examples": trainer.position.trained,
        "steps": trainer.position.steps,
        "first_train_loss": trainer.position.first.get("loss/train"),
        "last_train_loss": trainer.position.last.get("loss/train"),
        "first_nll_per_token": trainer.position.first.get(NLL_PER_TOKEN),
        "last_nll_per_token": trainer.position.last.get(NLL_PER_TOKEN),
        "useful_time_share": round(trainer.useful_share, 4),
        "micro_batch_tokens": trainer.objective.token_budget,
        "compute_dtype": name_of(trainer.objective.dtype),
        "metrics": {
            name: value
            for name, value in {**trainer.position.last, **evaluation}.items()
            if math.isfinite(value)
        },
    }
    return details


def write_run(
    folder: Path,
    config: RunConfig,
    stage: Stage,
    examples: Examples,
    code: str,
    details: dict[str, Any],
) -> None:
    """``run.json`` beside the weights: settings, data, code and figures."""
    record = {
        "stage": stage,
        "config": stage_settings(config, stage),
        "data_fingerprint": examples.fingerprint,
        "code": code,
        **details,
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
