"""Which pairs and log-probabilities in its folder ``dpo train`` takes, replaces or leaves."""

import pytest

from dpo.cli import main
from dpo.config.compose import compose
from dpo.storage.manifest import read_manifest, write_manifest
from dpo.train import direct
from dpo.train.direct import train_directly
from tests.train.conftest import SETTINGS


@pytest.mark.parametrize("user", ["evaluation", "policy"])
def test_what_another_output_was_made_from_is_not_replaced(
    user, prepared, tmp_path, monkeypatch, capsys
):
    """Without ``reference=``, out/reference of another training beside it was overwritten."""
    kept = []
    monkeypatch.setattr(direct, "run_train", lambda *_, **paths: kept.append(paths["reference"]))

    def train(name, *more):
        config = compose([*SETTINGS, "n_examples=8", *more]).config
        train_directly(config, data=prepared.data, base=prepared.sft, output=tmp_path / name)

    train("policy")
    made = read_manifest(tmp_path / "reference")
    (tmp_path / user).mkdir()
    (tmp_path / user / "model.txt").write_text("trained")
    write_manifest(tmp_path / user, stage="preference", inputs={"reference": made.content_hash})
    train("other", "n_eval_examples=4")
    assert read_manifest(tmp_path / "reference").content_hash == made.content_hash
    assert "reference stays, since others were made from it" in capsys.readouterr().err
    # the same ones are shared
    train("third")
    # what an output itself was made from is replaced with it
    train("policy", "n_eval_examples=4")
    others = tmp_path / ("reference" if user == "policy" else "policy-reference")
    assert kept == [tmp_path / name for name in ("reference", "other-reference", "reference")] + [
        others
    ]


def test_pairs_that_another_output_was_made_from_are_not_replaced(tmp_path, monkeypatch):
    """``dpo train`` without ``data=`` put the pairs of its own settings into out/data."""
    monkeypatch.setattr(direct, "run_train", lambda *_, **__: None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pairs.txt").write_text("mine")
    mine = write_manifest(tmp_path / "data", stage="ingest", settings={"datasets": ["mine.csv"]})
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/model.txt").write_text("trained")
    write_manifest(tmp_path / "sft", stage="sft", inputs={"pairs": mine.content_hash})
    train_directly(
        compose([*SETTINGS, "loss=sft", "n_examples=16"]).config, output=tmp_path / "model"
    )
    assert read_manifest(tmp_path / "data").content_hash == mine.content_hash
    ours = read_manifest(tmp_path / "model-data", stage="ingest")
    assert ours.settings["datasets"] == ["hh_sample"]


def test_a_run_s_own_pairs_and_log_probabilities_are_replaced_together(tmp_path, monkeypatch):
    """Its log-probabilities kept its pairs, which no output that was there was made from then."""
    monkeypatch.setattr(direct, "run_train", lambda *_, **__: None)
    settings = [*SETTINGS, "loss=dpo", "n_examples=4", "n_eval_examples=4"]
    for more in ("seed=0", "seed=1"):
        train_directly(compose([*settings, more]).config, output=tmp_path / "model")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "reference"]
        assert read_manifest(tmp_path / "data").settings["seed"] == int(more[-1])
    # another training was made with these log-probabilities, so their pairs stay too
    made = read_manifest(tmp_path / "reference")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.txt").write_text("trained")
    inputs = {"reference": made.content_hash}
    write_manifest(tmp_path / "other", stage="preference", inputs=inputs)
    train_directly(compose([*settings, "seed=2"]).config, output=tmp_path / "model")
    assert read_manifest(tmp_path / "data").content_hash == made.inputs["pairs"]
    assert read_manifest(tmp_path / "reference").content_hash == made.content_hash
    assert read_manifest(tmp_path / "model-data").settings["seed"] == 2


def test_log_probabilities_of_dpo_reference_are_gone_on_with(prepared, tmp_path, monkeypatch):
    """The command did not say with what code it made them, so they were made anew."""
    settings = [*SETTINGS, "loss=dpo", "n_examples=4", "n_eval_examples=4"]
    given = [f"data={prepared.data}", f"base={prepared.sft}"]
    assert main(["reference", *settings, *given, f"output={tmp_path}/reference"]) == 0
    monkeypatch.setattr(direct, "run_train", lambda *_, **__: None)
    monkeypatch.setattr(direct, "run_reference", lambda *_, **__: 1 / 0)
    train_directly(
        compose(settings).config, data=prepared.data, base=prepared.sft, output=tmp_path / "model"
    )
