"""The model card. It holds nothing that differs between equal runs: no path, time or run id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LIMITS = (
    "Trained on preferences of people, it may repeat their mistakes and be wrong or offensive. "
    "Measure it on your own data before you rely on it."
)


def model_card(policy: Path, name: str, base_model: str) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        policy: Checkpoint of the preference stage.
        name: Name under which it is published.
        base_model: Hub id of the base model, or what else names it.
    """
    run = json.loads((policy / "run.json").read_text(encoding="utf-8"))
    loss = run["config"]["loss"]
    config = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["preference-fine-tuning", loss["name"]],
    }
    if "/" in base_model and not base_model.startswith("/"):
        metadata["base_model"] = base_model
    block = "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items())
    return f"""---
{block}
---

# {name}

A language model fine-tuned with preference data: supervised fine-tuning on the preferred responses,
then {_loss_name(loss)}.

- Base model: {base_model}
- Architecture: {", ".join(config.get("architectures") or ["unknown"])}
- Loss: {_options(loss)}
- Training: {run["examples"]} pairs in {run["steps"]} optimiser steps,
  {run["config"]["optimizer"]}, learning rate {run["config"]["lr"]}
- Data fingerprint: `{run["data_fingerprint"]}`

## Intended use

Text generation in the form of its training data. The licences of base model and data apply.

## Limits

{_LIMITS}
"""


_LOSS_NAMES = {
    "dpo": "direct preference optimisation (DPO)",
    "robust": "robust DPO",
    "hinge": "preference training with a hinge loss (SLiC)",
    "ipo": "identity preference optimisation (IPO)",
    "simpo": "simple preference optimisation (SimPO)",
    "orpo": "odds-ratio preference optimisation (ORPO)",
}


def _loss_name(loss: dict[str, Any]) -> str:
    if loss["name"] == "dpo" and loss.get("label_smoothing", 0) > 0:
        return "conservative DPO"
    return _LOSS_NAMES[loss["name"]]


def _options(loss: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(loss.items()))
