"""Whether an artifact that a run is given in place of a step's output fits what the run asks for.

Of an artifact's settings only those are compared that the steps after it rely on: an SFT model of
another origin was trained as its maker liked, and a run's settings of SFT do not speak of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dpo.config.parameters import DEFAULT_MODEL
from dpo.config.reuse import differing, shown
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, stage_settings
from dpo.errors import ConfigError
from dpo.storage.lineage import base_model
from dpo.storage.manifest import Manifest

_PATH = re.compile(r"^[/.~]|/.*/")


def check_fits(
    name: str,
    uri: str,
    manifest: Manifest,
    configs: Mapping[Stage, RunConfig],
    parameters: Mapping[str, Any],
) -> None:
    """Refuse an artifact that the steps after it could not use, before any of them runs.

    Args:
        name: The parameter that gave it.
        uri: Where it is.
        manifest: Its manifest.
        configs: Of the run, by step.
        parameters: Of the run, as they were given.

    Raises:
        ConfigError: log-probabilities of other pairs or lengths; a model of another base than the
            one that was chosen.
    """
    if name == "reference_uri":
        asked = stage_settings(configs["reference"], "reference")
        made = {key: value for key, value in manifest.settings.items() if key != "model"}
        if changes := differing("reference", made, asked):
            raise ConfigError(
                "these log-probabilities were made with other settings than this run asks for: "
                f"{shown(changes)}",
                where=f"{name}={uri}",
                fix=f"give this run the settings that they were made with, or leave {name} out",
            )
    if name == "sft_model_uri" and parameters.get("model", DEFAULT_MODEL) != DEFAULT_MODEL:
        base, asked_base = base_model(manifest), configs["sft"].model.name_or_path
        # a folder may be called otherwise on another machine
        named = bool(base) and not any(map(_PATH.search, (base, asked_base)))
        if named and base != asked_base:
            raise ConfigError(
                f"this model was made from {base}, and the run asks for model={asked_base}, whose "
                "tokenizer would prepare the pairs",
                where=f"{name}={uri}",
                fix=f"set model={base}, or leave {name} out",
            )
