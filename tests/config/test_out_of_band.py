"""Settings that change no result are no part of a step's cache key, and reach the step."""

import json

import pytest

from dpo.config.parameters import stage_configs
from dpo.config.stages import (
    OUT_OF_BAND,
    OUT_OF_BAND_VARIABLE,
    STAGE_KEYS,
    load_stage,
    out_of_band,
    stage_json,
)
from dpo.errors import ConfigError

CHANGED = {
    "model": "tiny",
    "sft_overrides": ["minimum_log_interval_secs=7", "wandb.project=other", "exp_name=mine"],
    "preference_overrides": ["checkpoint_every=64", "keep_checkpoints=5", "resume=never"],
}


def test_they_leave_the_key_as_it_was():
    plain, changed = stage_configs({"model": "tiny"}), stage_configs(CHANGED)
    for stage in ("sft", "preference"):
        assert stage_json(plain[stage], stage, key_only=True) == stage_json(
            changed[stage], stage, key_only=True
        )
        assert stage_json(plain[stage], stage) != stage_json(changed[stage], stage)


def test_they_reach_the_step_through_the_environment(monkeypatch):
    configs = stage_configs(CHANGED)
    monkeypatch.setenv(OUT_OF_BAND_VARIABLE, out_of_band(configs))
    sft = load_stage("sft", stage_json(configs["sft"], "sft"))
    assert sft.minimum_log_interval_secs == 7
    assert sft.wandb.project == "other"
    assert sft.exp_name == "mine"
    preference = load_stage("preference", stage_json(configs["preference"], "preference"))
    assert preference.checkpoint_every == 64
    assert preference.keep_checkpoints == 5
    assert preference.lr == configs["preference"].lr


def test_without_the_environment_they_are_arguments(monkeypatch):
    monkeypatch.delenv(OUT_OF_BAND_VARIABLE, raising=False)
    configs = stage_configs(CHANGED)
    assert load_stage("sft", stage_json(configs["sft"], "sft")).minimum_log_interval_secs == 7


def test_nothing_that_decides_the_result_is_among_them(monkeypatch):
    """The environment cannot change a learning rate behind the cache's back."""
    monkeypatch.setenv(
        OUT_OF_BAND_VARIABLE, json.dumps({"sft": {"lr": 9.0, "keep_checkpoints": 3}})
    )
    loaded = load_stage("sft", "{}")
    assert loaded.lr != 9.0
    assert loaded.keep_checkpoints == 3
    for key in (
        "lr",
        "loss",
        "model",
        "seed",
        "batch_size",
        "lora",
        "micro_batch_tokens",
        "trainer",
    ):
        assert key not in OUT_OF_BAND
    assert STAGE_KEYS["preference"] >= OUT_OF_BAND


@pytest.mark.parametrize("text", ["{", "[]", '{"sft": 1}'])
def test_a_broken_environment_is_named(monkeypatch, text):
    monkeypatch.setenv(OUT_OF_BAND_VARIABLE, text)
    with pytest.raises(ConfigError, match=OUT_OF_BAND_VARIABLE):
        load_stage("sft", "{}")
