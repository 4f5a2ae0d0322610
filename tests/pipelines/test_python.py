"""``from pipelines import run_pipeline``: the whole DAG from Python, and what it refuses."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dpo.data.toy import toy_rows
from dpo.errors import ConfigError, PipelineError
from dpo.publish.verify import verify
from pipelines import run_pipeline


@pytest.mark.long
def test_a_run_ends_in_a_published_model(tmp_path):
    data = tmp_path / "toy.json"
    data.write_text(json.dumps({"communityId": "toy", "dataset": toy_rows()}))
    drawn = StringIO()
    outcome = run_pipeline(
        "toy",
        {"datasets": [data], "loss.beta": 0.25},
        runs_dir=tmp_path / "runs",
        console=Console(file=drawn),
    )
    assert outcome.state == "succeeded", outcome.message
    assert set(outcome.steps.values()) == {"done"}
    assert verify(outcome.published["url"])["name"] == "policy"
    assert outcome.published["url"].startswith((tmp_path / "runs" / "published").as_uri())
    record = json.loads((tmp_path / "runs" / "history" / outcome.run_id / "run.json").read_text())
    assert record["parameters"]["preference_beta"] == 0.25
    # 80 pairs, of which the hash of the prompt holds 16 out
    assert outcome.evaluation["n_pairs"] == 16
    assert "publish      done" in drawn.getvalue()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"preset": "fast"}, ConfigError, "no preset is called fast"),
        ({"settings": {"preference_betta": 1}}, ConfigError, "did you mean preference_beta"),
        ({"settings": {"preference_beta": "much"}}, ConfigError, "expected a number"),
        ({"rerun": ["sfft"]}, ConfigError, "no step is called sfft"),
        (
            {"where": "docker", "images": {"data": "r/d:1", "train": "r/t:1"}},
            PipelineError,
            "no store to publish to",
        ),
        ({"where": "docker", "store": "s3://m", "images": {"dta": "r/d:1"}}, ConfigError, "KIND"),
        ({"nodes": 2}, ConfigError, "nodes=2 is for Kubeflow"),
        ({"start_from": "none"}, PipelineError, "there is no local run none"),
        ({"start_from": ""}, ConfigError, "start_from is empty"),
        ({"timeout_seconds": 0}, ConfigError, "timeout_seconds=0 is not a positive number"),
        ({"sweep": {"loss.beta": [0.1, 0.1]}}, ConfigError, "names a value twice"),
        ({"sweep": {"loss.bta": [0.1, 0.2]}}, ConfigError, "loss.bta"),
        ({"settings": {"model": "tiny", "datasets": ["/no/such.jsonl"]}}, None, "such"),
        ({"where": "cluster", "store": "s3://models"}, PipelineError, "no Kubeflow Pipelines"),
    ],
)
def test_mistakes_raise_before_anything_runs(arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    with pytest.raises(error or Exception) as caught:
        run_pipeline(**arguments, runs_dir=tmp_path / "runs")
    assert message in str(caught.value)
    assert not (tmp_path / "runs" / "history").exists()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A function that runs the toy preset in one folder, and what its first call returned."""
    folder = tmp_path_factory.mktemp("toy")
    data = folder / "toy.json"
    data.write_text(json.dumps({"communityId": "toy", "dataset": toy_rows()}))

    def run(**arguments):
        settings = {"datasets": [data], **arguments.pop("settings", {})}
        place = {"runs_dir": folder / "runs", "console": Console(file=StringIO())}
        return run_pipeline(settings=settings, **{"preset": "toy", **place, **arguments})

    return run, run()


def sources(outcome, runs_dir):
    record = json.loads((runs_dir / "history" / outcome.run_id / "run.json").read_text())
    return record["artifacts"]


@pytest.mark.long
def test_a_run_starts_from_an_earlier_one(toy):
    run, first = toy
    again = run(preset=None, settings={"loss.beta": 0.3}, start_from=first.run_id)
    assert again.state == "succeeded", again.message
    assert again.steps["preference"] == "done"
    history = Path(first.places["SFT checkpoint"]).parents[3] / "history"
    record = json.loads((history / again.run_id / "run.json").read_text())
    assert record["parameters"]["preference_beta"] == 0.3
    assert record["parameters"]["sft_model_uri"] == sources(first, history.parent)["sft"]


@pytest.mark.long
def test_artifacts_of_other_runs_take_the_place_of_steps(toy, tmp_path):
    run, first = toy
    known = sources(first, Path(first.places["SFT checkpoint"]).parents[3])
    adopted = run(
        runs_dir=tmp_path / "runs",
        data_uri=known["ingest"],
        sft_model_uri=known["sft"],
        reference_uri=known["reference"],
    )
    assert adopted.state == "succeeded", adopted.message
    assert adopted.evaluation["n_pairs"] == first.evaluation["n_pairs"]
    assert adopted.published["content_hash"] == first.published["content_hash"]


@pytest.mark.long
def test_a_sweep_publishes_one_of_its_policies(toy):
    run, first = toy
    swept = run(sweep={"loss.beta": [0.1, 0.5]})
    assert swept.state in ("succeeded", "refused"), swept.message
    assert swept.steps["sft"] == "cached"
    assert swept.steps["select"] == "done"
    assert swept.evaluation["n_pairs"] < first.evaluation["n_pairs"], "the test part alone"


def test_importing_pipelines_imports_neither_kfp_nor_torch():
    code = "import pipelines, sys; print({'kfp', 'torch', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
