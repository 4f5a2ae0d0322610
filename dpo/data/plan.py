"""What a pipeline run will do: each step's settings, and fingerprints of all that it reads.

The first step of the pipeline calls ``plan_run``. What it returns are the arguments of the other
steps, so Kubeflow's cache sees each change of data, base model, settings or code, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dpo.config.parameters import stage_configs
from dpo.config.stages import Stage, stage_json
from dpo.data.rules import tokenizer_fingerprint
from dpo.data.sources import data_fingerprint, source_fingerprints
from dpo.storage.base_model import model_fingerprint
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.store import open_store

_CACHED: tuple[Stage, ...] = ("ingest", "sft", "reference", "preference", "evaluate")
_NEVER_CACHED: tuple[Stage, ...] = ("gate", "publish")


def plan_run(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Settings and fingerprints by output name (``sft_settings``, ``sft_fingerprint``, ...).

    Everything that can be known to be wrong before training is found here: a setting, a source or a
    base model that is missing, a store that does not answer.
    """
    configs = stage_configs(parameters)
    publish = configs["publish"].publish
    if publish.store:
        open_store(publish.store).check(create=publish.create_bucket)
    data = data_fingerprint(source_fingerprints(configs["ingest"]))
    model = model_fingerprint(configs["sft"].model)
    sources: dict[Stage, dict[str, str]] = {"ingest": {"data": data}, "sft": {"model": model}}
    # texts are checked against it, and it may bring the chat template
    sources["ingest"]["tokenizer"] = tokenizer_fingerprint(configs["ingest"])
    plan = {f"{stage}_settings": stage_json(configs[stage], stage) for stage in _NEVER_CACHED}
    for stage in _CACHED:
        known = {"code": code_fingerprint(stage), **sources.get(stage, {})}
        plan[f"{stage}_settings"] = stage_json(configs[stage], stage)
        plan[f"{stage}_fingerprint"] = json.dumps(known, sort_keys=True)
    return plan
