"""An artifact that a run is given: compared with what the steps after it rely on."""

import pytest

from dpo.config.parameters import DEFAULT_MODEL, stage_configs
from dpo.config.stages import stage_settings
from dpo.data.given import check_fits
from dpo.errors import ConfigError
from dpo.storage.manifest import Manifest
from pipelines import package

MADE = {"model": "tiny", "preference_n_examples": 32, "evaluate_n_pairs": 20, "seed": 3}


def check(name, manifest, **values):
    check_fits(name, "/there", manifest, stage_configs(values), values)


def scored(**values):
    settings = stage_settings(stage_configs({**MADE, **values})["reference"], "reference")
    return Manifest("reference", (), "c" * 64, settings=settings)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, None),
        ({"model": DEFAULT_MODEL, "preference_n_examples": 16, "preference_n_epochs": 3}, None),
        ({"preference_n_examples": 33}, "n_examples=32 → 33"),
        ({"evaluate_n_pairs": 19}, "n_eval_examples=20 → 19"),
        ({"seed": 4, "max_length": 80, "max_prompt_length": 40}, "seed=3 → 4"),
    ],
)
def test_log_probs_must_hold_the_pairs_of_this_run(values, words):
    asked = {**MADE, **values}
    if words is None:
        check("reference_uri", scored(), **asked)
        return
    with pytest.raises(ConfigError) as caught:
        check("reference_uri", scored(), **asked)
    assert words in str(caught.value)
    assert "or leave reference_uri out" in str(caught.value)


def test_log_probs_of_all_pairs_hold_those_of_any_choice():
    check("reference_uri", scored(preference_n_examples=0, evaluate_n_pairs=0), **MADE)


def trained(base):
    return Manifest("sft", (), "c" * 64, settings={"model": {"name_or_path": base}})


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("tiny", "builtin:tiny"),
        # nobody chose a model, a folder of another machine, an origin that was not recorded
        (DEFAULT_MODEL, "builtin:tiny"),
        ("tiny", "/models/tiny"),
        ("tiny", ""),
    ],
)
def test_a_model_of_another_origin_is_taken(model, base):
    check("sft_model_uri", trained(base), model=model)
    check("sft_model_uri", Manifest("published", (), "c" * 64), model=model)


def test_a_model_of_another_base_than_was_chosen_is_refused():
    with pytest.raises(ConfigError, match="was made from org/other") as caught:
        check("sft_model_uri", trained("org/other"), model="tiny")
    assert "set model=org/other, or leave sft_model_uri out" in str(caught.value)


def test_the_model_that_nobody_chose_is_that_of_the_form():
    assert package.defaults(package.load_package())["model"] == DEFAULT_MODEL
