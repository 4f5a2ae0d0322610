"""``--from RUN_ID``: what of an earlier run a new one begins with, and what it makes anew."""

import json
import subprocess
from itertools import pairwise

import pytest

from pipelines import package, start, submit
from pipelines.request import parameters
from tests.support.checkout import ROOT

OUTPUTS = {step: f"/runs/{step}" for step in ("ingest", "sft", "reference", "preference")}
URIS = ("data_uri", "sft_model_uri", "reference_uri")


@pytest.fixture(scope="module")
def defaults():
    return package.defaults(package.load_package())


@pytest.fixture
def runs(tmp_path, defaults):
    """A folder with the record of one run, ``earlier``, of the toy preset."""
    values = parameters(defaults, preset_name="toy", assignments=["preference_n_examples=32"])
    folder = tmp_path / "history" / "earlier"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"parameters": values, "artifacts": OUTPUTS}))
    return tmp_path


@pytest.fixture
def begun(runs, defaults):
    """A function: which artifacts a run from ``earlier`` keeps, and why it does without others."""

    def begin(*assignments, rerun=()):
        place = {"local": True, "store": None, "endpoint": (None, None)}
        values = start.beginning(defaults, runs, run_id="earlier", rerun=rerun, **place)
        asked = parameters(values, assignments=assignments)
        kept, reasons = start.renewed(values, asked)
        return [name for name in URIS if kept[name]], reasons

    return begin


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("loss.beta=0.3", [*URIS]),
        ("preference.lr=1e-4", [*URIS]),
        ("preference_n_epochs=2", [*URIS]),
        # 16 examples are the first of the 32 that were scored
        ("preference_n_examples=16", [*URIS]),
        ("preference_loss=simpo", [*URIS]),
        ("trainer=FSDPTrainer", [*URIS]),
        ("model.compile=true", [*URIS]),
        ("model.compute_dtype=float32", ["data_uri"]),
        ("preference_n_examples=48", ["data_uri", "sft_model_uri"]),
        ("evaluate_n_pairs=50", ["data_uri", "sft_model_uri"]),
        ("sft.lr=1e-4", ["data_uri"]),
        ("model=smollm2", []),
        ("datasets=[se]", []),
        ("max_length=80", []),
        ("seed=1", []),
        # what is given for this run stays, and what the earlier run made of another does not
        ("data_uri=/mine", ["data_uri"]),
        ("sft_model_uri=/mine", ["data_uri", "sft_model_uri"]),
    ],
)
def test_an_artifact_is_kept_where_it_is_what_this_run_would_make(begun, setting, kept):
    assert begun(setting)[0] == kept


def test_what_runs_although_an_artifact_was_there_is_said_with_the_setting(begun):
    _, reasons = begun("sft.lr=1e-4")
    assert start.told("earlier", reasons) == [
        "sft runs although it starts from earlier: lr=0.001 → 0.0001",
        "reference runs although it starts from earlier: reads the new output of sft",
    ]
    assert begun("sft.lr=1e-4", rerun=["sft"])[1] == {}, "that was asked for"


def test_a_preset_beside_an_earlier_run_is_refused(runs, capsys):
    place = ["--local", "--runs-dir", str(runs)]
    assert submit.main([*place, "--from", "earlier", "--preset", "quick"]) == 2
    said = capsys.readouterr().err
    assert "the preset quick and the run earlier" in said
    assert "leave out one of the two" in said


@pytest.mark.parametrize(
    ("words", "presets"),
    [
        (["ARGS=--from x"], []),
        (["ARGS=--rerun sft --from=x"], []),
        (["ARGS=--from x", "PRESET=full"], ["full"]),
        (["ARGS=--rerun sft"], ["quick"]),
        (["PRESET=full"], ["full"]),
    ],
)
def test_make_run_brings_its_preset_only_where_nobody_starts_from_a_run(words, presets):
    done = subprocess.run(
        ["make", "-n", "run", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = [line.split() for line in done.stdout.splitlines() if "submit.py" in line]
    assert [after for word, after in pairwise(command) if word == "--preset"] == presets


def test_json_tells_what_never_began_from_what_failed(tmp_path, capsys):
    asked = ["--local", "--runs-dir", str(tmp_path), "--from", "nobody", "--output", "json"]
    assert submit.main(asked) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["exit_code"]) == ("not started", 2)
    assert "nobody" in told["message"]
