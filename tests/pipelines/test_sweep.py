"""What a sweep may vary, and what all its candidates must share."""

import json

import pytest

from dpo.errors import ConfigError
from pipelines import package
from pipelines.request import check_candidates, parameters
from pipelines.sweep import parse_sweep

TOY = ("model=tiny", "preference_n_examples=32", "evaluate_n_pairs=16", "max_prompt_length=40")


def check(*sweep, settings=TOY):
    defaults = package.defaults(package.load_package())
    check_candidates(parameters(defaults, assignments=settings), parse_sweep(sweep))


@pytest.mark.parametrize(
    ("sweep", "setting"),
    [
        ("seed=1,2", "seed=0 → 1"),
        ("max_length=80,256", "max_length=256 → 80"),
        ("n_examples=16,64", "n_examples=32 → 64"),
        ("model.compute_dtype=float32,bfloat16", "model.compute_dtype='auto' → 'float32'"),
    ],
)
def test_candidates_that_need_other_log_probabilities_are_refused(sweep, setting):
    with pytest.raises(ConfigError, match="share the reference step's log-prob") as caught:
        check(sweep)
    assert setting in str(caught.value)


@pytest.mark.parametrize(
    "sweep",
    # the first 16 of the 32 pairs that are scored; more passes over the same; no reference at all
    ["n_examples=16,32", "n_epochs=1,2", "loss=dpo,simpo", "preference_lr=1e-5,1e-4"],
)
def test_candidates_that_are_served_by_the_shared_log_probabilities_are_taken(sweep):
    check(sweep)


def test_a_run_without_a_reference_scores_nothing_for_a_candidate_that_needs_it():
    with pytest.raises(ConfigError, match="do not hold for loss=dpo: score_training_pairs"):
        check("loss=simpo,dpo", settings=(*TOY, "preference_loss=simpo"))


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["loss.beta=0.1,0.10"], "names a value twice"),
        (["lr=1e-3,0.001"], "names a value twice"),
        (["loss.beta=0.1,0.2", "preference_beta=0.3"], "varies loss.beta twice"),
        (["evaluation.n_samples=1,2"], "evaluation.n_samples is not of it"),
        (["evaluate_n_pairs=8,16"], "n_eval_examples is not of it"),
        (["exp_name=a,b"], "exp_name is not of it"),
        (["sft_lr=1,2"], "sft_lr"),
    ],
)
def test_what_is_no_choice_of_preference_training_is_refused(sweep, words):
    with pytest.raises(ConfigError, match=words):
        parse_sweep(sweep)


def test_a_parameter_of_the_form_names_its_setting():
    found = parse_sweep(["preference_label_smoothing=0.1,0.2"])
    assert [json.loads(item) for item in found] == [
        ["loss.label_smoothing=0.1"],
        ["loss.label_smoothing=0.2"],
    ]


@pytest.mark.parametrize("values", ["abc,def", "-1,0.5"])
def test_a_package_is_not_written_with_candidates_that_cannot_train(values, tmp_path, capsys):
    images = ["--image", "data=r/d:1", "--image", "train=r/t:1"]
    target = tmp_path / "package.yaml"
    assert package.main(["--output", str(target), *images, "--sweep", f"loss.beta={values}"]) == 2
    assert "beta" in capsys.readouterr().err
    assert not target.exists()
