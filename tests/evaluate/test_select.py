"""The best candidate of a sweep."""

import json

import pytest

from dpo.config.stages import load_stage, overridden
from dpo.errors import ArtifactError
from dpo.evaluate.select import run_select
from dpo.storage.manifest import read_manifest, write_manifest


@pytest.fixture
def candidate(tmp_path):
    """A policy and its evaluation; only what selection reads."""

    def make(name, accuracy, loss, part="validation", of=None, kind="dpo", area=0.5):
        policy, evaluation = tmp_path / f"{name}-policy", tmp_path / f"{name}-evaluation"
        policy.mkdir()
        evaluation.mkdir()
        (policy / "model.bin").write_text(name)
        trained = write_manifest(policy, "preference")
        figures = {"reward_accuracy": {"value": accuracy}, "loss": {"value": loss}}
        judged = {"after": figures, "loss": {"name": kind}, "calibration": {"auc": {"value": area}}}
        (evaluation / "evaluation.json").write_text(json.dumps(judged))
        write_manifest(
            evaluation,
            "evaluate",
            inputs={"policy": of or trained.content_hash},
            settings={"evaluation": {"part": part}},
        )
        return policy, evaluation

    return make


def chosen(tmp_path, *made):
    names = [json.dumps([f"loss.beta=0.{n}"]) for n in range(len(made))]
    policies, evaluations = zip(*made, strict=True)
    return run_select(names, policies, evaluations, tmp_path / "best")


def test_the_highest_accuracy_wins_and_its_content_stays(candidate, tmp_path):
    made = [candidate("a", 0.5, 0.6), candidate("b", 0.7, 0.69), candidate("c", 0.6, 0.1)]
    best, table, manifest = chosen(tmp_path, *made)
    assert json.loads(best.overrides) == ["loss.beta=0.1"]
    assert manifest.content_hash == read_manifest(made[1][0]).content_hash
    assert (tmp_path / "best/model.bin").read_text() == "b"
    assert "| loss.beta=0.1 | 0.700 | 0.690 | selected |" in table
    assert "| loss.beta=0.0 | 0.500 | 0.600 |  |" in table


def test_equal_accuracies_are_decided_by_the_loss(candidate, tmp_path):
    best, _, _ = chosen(tmp_path, candidate("a", 0.6, 0.69), candidate("b", 0.6, 0.65))
    assert json.loads(best.overrides) == ["loss.beta=0.1"]


def test_equal_accuracies_of_other_losses_are_decided_by_the_area_under_the_curve(
    candidate, tmp_path
):
    """Of IPO with beta 0.1 the loss begins at 1 / (4 beta^2) = 25, of DPO at log 2."""
    made = [candidate("a", 0.6, 0.69), candidate("b", 0.6, 25.0, kind="ipo", area=0.55)]
    assert json.loads(chosen(tmp_path, *made)[0].overrides) == ["loss.beta=0.1"]


@pytest.mark.parametrize("part", ["test", "all"])
def test_the_test_part_is_not_selected_on(candidate, tmp_path, part):
    with pytest.raises(ArtifactError, match="selects on the validation part"):
        chosen(tmp_path, candidate("a", 0.6, 0.69, part=part))


def test_an_evaluation_of_another_policy_is_refused(candidate, tmp_path):
    with pytest.raises(ArtifactError, match="of another policy"):
        chosen(tmp_path, candidate("a", 0.6, 0.69, of="0" * 64))


def test_overrides_of_a_candidate_reach_the_settings_of_the_steps_that_read_them():
    changes = ["loss.beta=0.25", "loss=ipo", "lr=1e-6"]
    preference = load_stage("preference", overridden("preference", "{}", changes))
    assert (preference.loss.name, preference.loss.beta, preference.lr) == ("ipo", 0.25, 1e-6)
    judged = overridden("evaluate", '{"loss": {"name": "dpo", "beta": 0.1}}', changes)
    assert json.loads(judged) == {"loss": {"name": "ipo", "beta": 0.25}}
    assert overridden("evaluate", "{}", []) == "{}"
