"""Which settings each step reads.

A step gets those and no others: reading an undeclared one raises, so a cached result can never
depend on a setting that is not part of its cache key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from dpo.config.describe import validation_error
from dpo.config.schema import RunConfig
from dpo.errors import ConfigError

Stage = Literal["ingest", "sft", "reference", "preference", "evaluate", "gate", "publish"]
STAGES: tuple[Stage, ...] = get_args(Stage)

_TOKENS = {"max_length", "max_prompt_length", "truncation_mode"}
_SELECTION = {"seed", "n_epochs", "n_examples", "n_eval_examples"}
_TRAIN = (
    _TOKENS
    | _SELECTION
    | {"model", "loss", "trainer", "batch_size", "eval_batch_size", "gradient_accumulation_steps"}
    | {"micro_batch_tokens", "do_last_eval"}
    | {"lr", "lr_schedule", "warmup_steps", "optimizer", "max_grad_norm"}
    | {"activation_checkpointing", "deterministic"}
    | {"eval_every", "do_first_eval", "sample_during_eval"}
    | {"n_eval_model_samples", "debug", "exp_name", "resume"}
    | {"checkpoint_every", "checkpoint_seconds", "keep_checkpoints"}
    | {"checkpoint_uri", "process_timeout_seconds"}
    | {"minimum_log_interval_secs", "fsdp_port", "wandb", "tensorboard", "lora"}
)

OUT_OF_BAND = frozenset(
    {"checkpoint_every", "checkpoint_seconds", "keep_checkpoints", "checkpoint_uri", "resume"}
    | {"minimum_log_interval_secs", "wandb", "tensorboard", "debug", "exp_name"}
    | {"fsdp_port", "process_timeout_seconds"}
)
"""Settings of training that change nothing in its result: logs, checkpoints, ports, time-outs.

Where ``OUT_OF_BAND_VARIABLE`` is set they travel to the steps in it, and not in the arguments that
are a step's cache key: changing one of them then reruns nothing. A run that is started from a form
has only arguments, and reruns."""
OUT_OF_BAND_VARIABLE = "DPO_OUT_OF_BAND"
"""Environment variable: JSON object of such settings by stage."""

STAGE_KEYS: Mapping[Stage, frozenset[str]] = {
    "ingest": frozenset(
        {"datasets", "sources", "test_fraction", "max_rejected_share", "prompt_format", "seed"}
        | {"chat_template", "bad_rows"}
        | _TOKENS
        | {"model"}
    ),
    "sft": frozenset(_TRAIN),
    "reference": frozenset(
        _TOKENS
        | _SELECTION
        | {"model", "trainer", "micro_batch_tokens", "score_training_pairs"}
        | {"process_timeout_seconds"}
    ),
    "preference": frozenset(_TRAIN),
    "evaluate": frozenset(
        _TOKENS
        | {"model", "loss", "trainer", "seed", "n_eval_examples", "micro_batch_tokens"}
        | {"evaluation", "process_timeout_seconds"}
    ),
    "gate": frozenset({"gate", "publish"}),
    "publish": frozenset({"publish", "model"}),
}
"""Top-level keys of ``RunConfig`` that each step reads."""


def restrict(config: RunConfig, stage: Stage) -> RunConfig:
    """A copy of ``config`` on which only the settings that ``stage`` declares can be read."""
    view = config.model_copy()
    for key in type(config).model_fields:
        if key not in STAGE_KEYS[stage]:
            view.__dict__.pop(key, None)
    return view


def stage_settings(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """The declared settings of ``stage`` as JSON values: what its cache key is made of."""
    return config.model_dump(mode="json", include=set(STAGE_KEYS[stage]))


def stage_json(config: RunConfig, stage: Stage, *, key_only: bool | None = None) -> str:
    """``stage_settings`` as canonical JSON: sorted keys, no spaces.

    Args:
        config: Settings.
        stage: Whose.
        key_only: Leave out what changes no result; None does so where it travels by environment.
    """
    settings = stage_settings(config, stage)
    if key_only is None:
        key_only = OUT_OF_BAND_VARIABLE in os.environ
    if key_only:
        settings = {key: value for key, value in settings.items() if key not in OUT_OF_BAND}
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def out_of_band(configs: Mapping[Stage, RunConfig]) -> str:
    """What to set ``OUT_OF_BAND_VARIABLE`` to, for runs with these settings."""
    found = {
        stage: {
            key: value for key, value in stage_settings(config, stage).items() if key in OUT_OF_BAND
        }
        for stage, config in configs.items()
    }
    kept = {stage: values for stage, values in found.items() if values}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def _from_environment(stage: Stage) -> dict[str, Any]:
    text = os.environ.get(OUT_OF_BAND_VARIABLE)
    if not text:
        return {}
    try:
        values = json.loads(text).get(stage, {})
        return {key: values[key] for key in OUT_OF_BAND & STAGE_KEYS[stage] & set(values)}
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(
            f"{OUT_OF_BAND_VARIABLE} is not a JSON object of settings by stage",
            where="environment",
            fix="unset it, or start the run again",
        ) from None


def load_stage(stage: Stage, text: str) -> RunConfig:
    """The restricted configuration of a step from its JSON; keys left out take their defaults.

    Raises:
        ConfigError: not JSON, a key that the step does not read, a value out of range, or the loss
            of the other training step.
    """
    try:
        values = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"the settings of step {stage} are not JSON: {error}",
            where=f"settings of {stage}",
            fix='pass a JSON object such as {"seed": 0}',
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"the settings of step {stage} are a {type(values).__name__}, not a JSON object",
            where=f"settings of {stage}",
            fix='pass a JSON object such as {"seed": 0}',
        )
    if unread := sorted(set(values) - STAGE_KEYS[stage]):
        raise ConfigError(
            f"step {stage} does not read {', '.join(unread)}",
            where=f"settings of {stage}",
            fix=f"remove it; {stage} reads {', '.join(sorted(STAGE_KEYS[stage]))}",
        )
    # that of RunConfig is preference training's
    usual = {"loss": {"name": "sft"}} if stage == "sft" else {}
    try:
        config = RunConfig.model_validate({**usual, **_from_environment(stage), **values})
    except ValidationError as error:
        raise validation_error(error, RunConfig, where=f"settings of {stage}") from None
    if stage in ("sft", "preference") and (config.loss.name == "sft") != (stage == "sft"):
        # the loss alone decides what a training does
        raise ConfigError(
            f"loss={config.loss.name} is not a loss of step {stage}",
            where=f"settings of {stage}",
            fix="leave loss out" if stage == "sft" else "use loss=dpo or ipo, or the step sft",
        )
    return restrict(config, stage)


def overridden(stage: Stage, text: str, changes: Iterable[str]) -> str:
    """The settings of a step with ``KEY=VALUE`` over them, as a sweep varies them.

    ``loss=NAME`` takes the defaults of that loss, and ``loss.KEY`` is of the usual loss where the
    settings name none. Keys that the step does not read are left out: one candidate of a sweep is
    given to several steps.
    """
    changes = list(changes)
    if not changes:
        return text
    values = json.loads(text or "{}")
    # the loss itself first, because it replaces what is set of it
    for change in sorted(changes, key=lambda change: not change.startswith("loss=")):
        key, _, value = change.partition("=")
        *parents, last = key.split(".")
        if (parents or [last])[0] not in STAGE_KEYS[stage]:
            continue
        place = values
        if parents[:1] == ["loss"]:
            values.setdefault("loss", {"name": RunConfig.model_fields["loss"].default.name})
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = {"name": value} if key == "loss" else yaml.safe_load(value)
    return json.dumps(values, sort_keys=True, separators=(",", ":"))
