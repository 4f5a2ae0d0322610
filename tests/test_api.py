"""``from dpo import run_training``: what it returns, refuses and imports."""

import json
import subprocess
import sys
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo import run_training
from dpo.config.overrides import model_overrides, override_value
from dpo.errors import ConfigError, DataError


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_dpo_takes_no_time_and_no_torch():
    code = (
        "import sys, time; start = time.perf_counter(); import dpo; "
        "took = time.perf_counter() - start; from dpo import run_training; "
        "print(took, {'torch', 'hydra', 'pydantic'} & set(sys.modules))"
    )
    took, heavy = python(code).split(maxsplit=1)
    assert float(took) < 0.5
    assert heavy.strip() == "set()"


def test_the_package_exports_its_programmatic_interface():
    import dpo

    assert set(dpo.__all__) == {"TrainingResult", "__version__", "run_training"}
    for name in dpo.__all__:
        assert getattr(dpo, name) is not None
    with pytest.raises(AttributeError, match="run_trainings"):
        dpo.run_trainings  # noqa: B018


@pytest.fixture
def novalto(tmp_path):
    """Twelve pairs as a community posts them."""
    rows = [
        {"prompt": f"How are you, number {n}?", "chosen": f"Fine {n}", "rejected": f"Bad {n}"}
        for n in range(12)
    ]
    path = tmp_path / "novalto.json"
    path.write_text(json.dumps({"communityId": "acme", "dataset": rows}))
    return path


def test_the_old_call_trains_and_returns_the_artifact(novalto, tmp_path):
    result = run_training(
        model_name="tiny",
        datasets=["novalto"],
        loss_config={"name": "dpo", "beta": 0.25},
        exp_name="my_experiment",
        n_examples=8,
        debug=True,
        output_dir=tmp_path / "out",
        overrides=[f"sources.novalto.path={novalto}", "batch_size=4", "lr=1e-3"],
    )
    checkpoint = result["checkpoint"]
    assert result["artifact_path"] == str(checkpoint) == str(tmp_path / "out" / "LATEST")
    assert (checkpoint / "model.safetensors").is_file()
    assert result["run_dir"] == tmp_path / "out"
    # an untrained policy is its reference: the first loss of DPO is ln 2 for every pair
    assert result["manifest"]["details"]["first_train_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert result["manifest"]["details"]["examples"] == 8
    assert result["config"]["loss"]["beta"] == 0.25
    assert result["config"]["debug"] is True
    assert result["run_manifest"]["stage"] == "preference"
    assert result["run_manifest"]["data_fingerprint"]
    assert result["metrics"]["loss/train"] == result["manifest"]["details"]["last_train_loss"]
    record = json.loads((checkpoint / "run.json").read_text())
    assert record["config"]["exp_name"] == "my_experiment"


def test_sft_is_a_loss_like_the_others(novalto, tmp_path):
    result = run_training(
        "tiny", str(novalto), {"name": "sft"}, n_examples=4, output_dir=tmp_path / "sft"
    )
    assert result["manifest"]["stage"] == "sft"
    assert not (tmp_path / "sft" / "reference").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "tinny"}, "did you mean tiny"),
        ({"datasets": ["nowhere"]}, "there is no data set nowhere"),
        ({"loss_config": {"beta": 0.1}}, "loss_config has no name"),
        ({"loss_config": {"name": "ipo", "label_smoothing": 0.1}}, "the loss ipo ignores it"),
        ({"loss_config": {"name": "dpo", "beta": -1}}, "loss.beta=-1"),
        ({"n_examples": 0}, "n_examples=0"),
        ({"exp_name": "../escape"}, "exp_name"),
        ({"overrides": ["learning_rate=1"]}, "unknown key learning_rate"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(arguments, message, tmp_path):
    start = time.perf_counter()
    with pytest.raises(ConfigError) as error:
        run_training(**{"model_name": "tiny", "output_dir": tmp_path / "out", **arguments})
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    assert time.perf_counter() - start < 5


def test_missing_data_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="novalto"):
        run_training("tiny", ["novalto"], output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["plain", "it's", "a\\'b", "end\\", "two\\\\", "C:\\x", "a,b]", "null", "", "\\\\'x'\\"]
)
def test_any_text_survives_the_grammar_of_overrides(text):
    parsed = OverridesParser.create().parse_override(f"key={override_value(text)}")
    assert parsed.value() == text


def test_a_model_that_is_not_ours_is_a_place():
    assert model_overrides("org/model") == [
        "model=blank_model",
        "model.name_or_path='org/model'",
    ]
