"""Pipeline parameters: what the Kubeflow form shows, and the configuration keys behind them.

A pipeline run composes two configurations, one of the SFT stage and one of the preference stage.
A parameter sets one key in one of them or in both; every other key is reached through
``sft_overrides`` and ``preference_overrides``, which are applied last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo.config.base import LARGEST_INTEGER
from dpo.config.compose import compose
from dpo.config.describe import suggestion
from dpo.config.overrides import model_overrides, override_value, parsed_value, unquoted
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, restrict
from dpo.errors import ConfigError

Side = Literal["sft", "preference"]
Value = str | int | float | bool | list[str]


@dataclass(frozen=True)
class Parameter:
    """One pipeline parameter."""

    key: str
    """The configuration key that it sets."""
    sides: tuple[Side, ...] = ("sft", "preference")
    """Whose configuration it sets."""
    unset: Value | None = None
    """This value means: leave the key at its default (Kubeflow forms know no null)."""
    none: Value | None = None
    """This value means null."""


_SFT: tuple[Side, ...] = ("sft",)
_PREFERENCE: tuple[Side, ...] = ("preference",)

PARAMETERS: Mapping[str, Parameter] = {
    "model": Parameter("model"),
    "datasets": Parameter("datasets"),
    "prompt_format": Parameter("prompt_format"),
    "max_length": Parameter("max_length"),
    "max_prompt_length": Parameter("max_prompt_length"),
    "test_fraction": Parameter("test_fraction"),
    "max_rejected_share": Parameter("max_rejected_share"),
    "seed": Parameter("seed"),
    "sft_n_examples": Parameter("n_examples", _SFT, none=0),
    "sft_n_epochs": Parameter("n_epochs", _SFT),
    "sft_batch_size": Parameter("batch_size", _SFT),
    "sft_optimizer": Parameter("optimizer", _SFT),
    "sft_lr": Parameter("lr", _SFT),
    "sft_lr_schedule": Parameter("lr_schedule", _SFT),
    "sft_warmup_steps": Parameter("warmup_steps", _SFT),
    "preference_loss": Parameter("loss", _PREFERENCE),
    "preference_beta": Parameter("loss.beta", _PREFERENCE, unset=0.0),
    "preference_label_smoothing": Parameter("loss.label_smoothing", _PREFERENCE, unset=0.0),
    "preference_n_examples": Parameter("n_examples", _PREFERENCE, none=0),
    "preference_n_epochs": Parameter("n_epochs", _PREFERENCE),
    "preference_batch_size": Parameter("batch_size", _PREFERENCE),
    "preference_optimizer": Parameter("optimizer", _PREFERENCE),
    "preference_lr": Parameter("lr", _PREFERENCE),
    "preference_lr_schedule": Parameter("lr_schedule", _PREFERENCE),
    "preference_warmup_steps": Parameter("warmup_steps", _PREFERENCE),
    "evaluate_n_pairs": Parameter("n_eval_examples", _PREFERENCE, none=0),
    "evaluate_n_samples": Parameter("evaluation.n_samples", _PREFERENCE),
    "gate_min_reward_accuracy": Parameter("gate.min_reward_accuracy", _PREFERENCE),
    "gate_force": Parameter("gate.force", _PREFERENCE),
    "publish_store": Parameter("publish.store", _PREFERENCE, none=""),
    "publish_name": Parameter("publish.name", _PREFERENCE),
}
"""Every parameter but the two lists of overrides, in the order of the form."""

OVERRIDES: Mapping[str, Side] = {"sft_overrides": "sft", "preference_overrides": "preference"}

STARTS: Mapping[str, Stage] = {
    "data_uri": "ingest",
    "sft_model_uri": "sft",
    "reference_uri": "reference",
}
"""Parameters that name an earlier artifact, and the step whose work it spares; empty means none."""

DEFAULT_MODEL = "smollm2"
"""What ``model`` is where nobody chose one (a test compares it with the form)."""

_SHARED_SECTIONS = {"model", "datasets", "sources", "trainer", "wandb", "lora"}
_SHARED_KEYS = {parameter.key for parameter in PARAMETERS.values() if len(parameter.sides) == 2} | {
    "truncation_mode",
    "exp_name",
    "debug",
    "eval_batch_size",
    "activation_checkpointing",
    "deterministic",
    "minimum_log_interval_secs",
    "tensorboard",
}
_PREFERENCE_SECTIONS = {"loss", "evaluation", "gate", "publish"}
_SIDE_OF_STAGE: Mapping[Stage, Side] = {
    "ingest": "preference",
    "sft": "sft",
    "reference": "preference",
    "preference": "preference",
    "evaluate": "preference",
    "gate": "preference",
    "publish": "preference",
}


def stage_configs(parameters: Mapping[str, Any]) -> dict[Stage, RunConfig]:
    """The restricted configuration of every step of a pipeline run.

    Args:
        parameters: Values by parameter name; what is left out keeps the configuration's default.

    Raises:
        ConfigError: an unknown parameter, or a value that cannot work.
    """
    check_names(parameters)
    sides = {side: _compose_side(side, parameters) for side in ("sft", "preference")}
    if sides["preference"].loss.name == "sft":
        raise ConfigError(
            "preference_loss=sft: the preference stage needs a preference loss",
            fix="choose dpo, ipo or another preference loss",
        )
    _check_adapter(sides["preference"])
    if not sides["preference"].loss.needs_reference:
        # held-out pairs are scored all the same: the report compares with the SFT model
        sides["preference"] = sides["preference"].model_copy(update={"score_training_pairs": False})
    return {stage: restrict(sides[side], stage) for stage, side in _SIDE_OF_STAGE.items()}


def _check_adapter(config: RunConfig) -> None:
    """Found here, and not by the last step: an adapter alone is trained and published as one."""
    trained = config.lora.enabled and config.lora.save == "adapter"
    if trained and config.publish.lora == "merged":
        raise ConfigError(
            "lora.save=adapter with publish.lora=merged: the step that publishes does not have the "
            "model that the adapter belongs to",
            where="publish.lora",
            fix="leave lora.save=adapter out (a whole model is written and published), or add "
            "publish.lora=adapter",
        )
    if config.publish.lora == "adapter" and not trained:
        raise ConfigError(
            "publish.lora=adapter: the preference stage writes no adapter",
            where="publish.lora",
            fix="add lora.enabled=true and lora.save=adapter, or leave publish.lora out",
        )


def check_names(parameters: Iterable[str]) -> None:
    """Refuse a name that no parameter has.

    Raises:
        ConfigError: with the nearest name, or all of them.
    """
    for name in parameters:
        if name not in PARAMETERS and name not in OVERRIDES and name not in STARTS:
            known = [*PARAMETERS, *OVERRIDES, *STARTS]
            raise ConfigError(
                f"unknown pipeline parameter {name}{suggestion(name, known)}",
                fix="`python pipelines/submit.py --help` lists the parameters",
            )


def _compose_side(side: Side, parameters: Mapping[str, Any]) -> RunConfig:
    # the step evaluate measures on held-out pairs, so training need not
    overrides = ["do_first_eval=false", "do_last_eval=false"]
    overrides += ["loss=sft"] if side == "sft" else []
    overrides += [
        override
        for name, parameter in PARAMETERS.items()
        if side in parameter.sides and name in parameters
        for override in _override(parameter, parameters[name])
    ]
    name = f"{side}_overrides"
    own = parameters.get(name) or []
    if not isinstance(own, list) or not all(isinstance(item, str) for item in own):
        raise ConfigError(
            f"{name}={own!r}: expected a list of overrides", fix='for example ["lr=1e-6"]'
        )
    try:
        return compose([*overrides, *own]).config
    except ConfigError as error:
        found_in = f"parameter {name}" if _is_about(error.found, own) else None
        where = error.where or found_in or _parameter_in(error.found, side, parameters)
        raise ConfigError(error.found, where=where, fix=error.fix) from None


def _is_about(found: str, overrides: Iterable[str]) -> bool:
    """Whether a message quotes an override or begins with its key."""
    return any(
        found.startswith(f"{item.partition('=')[0].strip()}=") or (item or "''") in found
        for item in overrides
    )


def _parameter_in(found: str, side: Side, given: Iterable[str]) -> str | None:
    """The parameter whose key a message begins with: whoever filled in a form knows its name."""
    for name in given:
        parameter = PARAMETERS.get(name)
        if parameter and side in parameter.sides and found.startswith(f"{parameter.key}="):
            return f"parameter {name}"
    return None


def _override(parameter: Parameter, value: Value) -> list[str]:
    if parameter.unset is not None and value == parameter.unset:
        return []
    if parameter.none is not None and value == parameter.none:
        return [f"{parameter.key}=null"]
    if parameter.key == "model" and isinstance(value, str):
        return model_overrides(value)
    return [f"{parameter.key}={override_value(value)}"]


def route(assignment: str) -> tuple[str, Value]:
    """Where ``KEY=VALUE`` of a command line goes: a parameter's value, or one more override.

    ``KEY`` is a pipeline parameter (``preference_beta``), a configuration key that belongs to one
    stage or to both (``loss.beta``, ``model.name_or_path``), or one with its stage in front
    (``sft.lr``, ``preference.lr``).

    Returns:
        Parameter name and value. For ``sft_overrides`` and ``preference_overrides`` the value is
        one override to append, or a list of them; the name ``both_overrides`` means that both lists
        get it.

    Raises:
        ConfigError: no ``=``, or a key that both stages have with values of their own.
    """
    key, separator, value = assignment.partition("=")
    if not separator or not key or key != key.strip():
        raise ConfigError(
            f"{assignment!r} is not KEY=VALUE, without blanks around the =",
            fix="for example loss.beta=0.2; a value with spaces is quoted: --set 'KEY=A B', with "
            "make ARGS=\"--set 'KEY=A B'\"",
        )
    if key in STARTS:
        return key, unquoted(value)
    if key in PARAMETERS:
        return key, _parse(value)
    if key in OVERRIDES:
        return key, _overrides(value)
    side, _, rest = key.partition(".")
    if side in OVERRIDES.values() and rest:
        return _to_side(side, rest, value)
    section = key.partition(".")[0]
    if section in _PREFERENCE_SECTIONS:
        return _to_side("preference", key, value)
    if section in _SHARED_SECTIONS or key in _SHARED_KEYS:
        return "both_overrides", assignment
    if section in RunConfig.model_fields:
        raise ConfigError(
            f"{key} belongs to both training stages",
            fix=f"write sft.{key}={value} or preference.{key}={value}",
        )
    known = dict.fromkeys([*PARAMETERS, *OVERRIDES, *STARTS, *RunConfig.model_fields])
    raise ConfigError(
        f"unknown key {key}{suggestion(key, known)}", fix="`dpo config` prints every key"
    )


def _overrides(value: str) -> list[str]:
    """A list as the form takes it, or one override."""
    parsed = _parse(value)
    items = parsed if isinstance(parsed, list) else [value]
    return [str(item) for item in items]


def _to_side(side: str, key: str, value: str) -> tuple[str, Value]:
    for name, parameter in PARAMETERS.items():
        if parameter.key == key and parameter.sides == (side,):
            parsed = _parse(value)
            if (
                parsed == 0
                and not isinstance(parsed, bool)
                and 0 in (parameter.unset, parameter.none)
            ):
                # the form's word for an empty field, which nobody meant who wrote the key itself
                break
            return name, parsed
    return f"{side}_overrides", f"{key}={value}"


def _parse(value: str) -> Value:
    """A command line's text as JSON where it is JSON, as ``[a,b]`` where it is that, else text."""
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        if value.startswith("[") and value.endswith("]"):
            return _items(value)
        lowered = value.lower()
        return {"true": True, "false": False}.get(lowered, unquoted(value))
    if parsed is None or isinstance(parsed, dict):
        return value
    return parsed  # type: ignore[no-any-return]  # int, float, bool, str or list


def _items(value: str) -> list[str]:
    """Of ``[a,'b, c']``; also of letters that only quotes make an override."""
    items = parsed_value(value)
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return items
    return [unquoted(item.strip()) for item in value[1:-1].split(",") if item.strip()]


_EXPECTED: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
}
"""In the order of their tests: a bool is an int."""


def typed(name: str, value: Value, default: Value) -> Value:
    """``value`` in the type of the parameter's ``default``, as Kubeflow wants it.

    Args:
        name: What the value was given to, as the user wrote it.
        value: The value.
        default: The parameter's default.

    Raises:
        ConfigError: the value is not of that type.
    """
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool)
        if good and abs(value) > LARGEST_INTEGER:  # type: ignore[arg-type]  # an int where good
            raise ConfigError(
                f"{name}={value}: Kubeflow passes numbers on as floating-point ones, which hold no "
                f"integer above {LARGEST_INTEGER}",
                fix="choose a smaller one",
            )
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if good else value  # type: ignore[arg-type]  # a number where good
    elif isinstance(default, list):
        value = value if isinstance(value, list) else [str(value)]
        good = True
    else:
        value, good = str(value), not isinstance(value, list)
    if not good:
        expected = next(words for kind, words in _EXPECTED.items() if isinstance(default, kind))
        raise ConfigError(f"{name}={value!r}: expected {expected}")
    return value
