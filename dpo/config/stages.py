"""Which settings each step reads.

A step gets those and no others: reading an undeclared one raises, so a cached result can never
depend on a setting that is not part of its cache key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

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
    | {"activation_checkpointing", "eval_every", "do_first_eval", "sample_during_eval"}
    | {"n_eval_model_samples", "debug", "exp_name", "resume"}
    | {"checkpoint_every", "checkpoint_seconds", "keep_checkpoints"}
    | {"minimum_log_interval_secs", "fsdp_port", "wandb"}
)

STAGE_KEYS: Mapping[Stage, frozenset[str]] = {
    "ingest": frozenset(
        {"datasets", "sources", "test_fraction", "max_rejected_share", "prompt_format", "seed"}
        | {"chat_template", "bad_rows"}
        | _TOKENS
        | {"model"}
    ),
    "sft": frozenset(_TRAIN),
    "reference": frozenset(
        _TOKENS | _SELECTION | {"model", "trainer", "micro_batch_tokens", "score_training_pairs"}
    ),
    "preference": frozenset(_TRAIN),
    "evaluate": frozenset(
        _TOKENS
        | {"model", "loss", "trainer", "seed", "n_eval_examples", "micro_batch_tokens"}
        | {"evaluation"}
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


def stage_json(config: RunConfig, stage: Stage) -> str:
    """``stage_settings`` as canonical JSON: sorted keys, no spaces."""
    return json.dumps(stage_settings(config, stage), sort_keys=True, separators=(",", ":"))


def load_stage(stage: Stage, text: str) -> RunConfig:
    """The restricted configuration of a step from its JSON; keys left out take their defaults.

    Raises:
        ConfigError: not JSON, a key that the step does not read, or a value out of range.
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
    try:
        return restrict(RunConfig.model_validate(values), stage)
    except ValidationError as error:
        raise validation_error(error, RunConfig, where=f"settings of {stage}") from None
