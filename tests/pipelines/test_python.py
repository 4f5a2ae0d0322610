"""``from pipelines import run_pipeline``: the whole DAG from Python, and what it refuses."""

import json
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from dpo.data.toy import toy_rows
from dpo.errors import ConfigError, PipelineError
from dpo.publish.verify import verify
from pipelines import run_pipeline


@pytest.mark.slow
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
        ({"settings": {"preference_beta": "much"}}, ConfigError, "expected a float"),
        ({"rerun": ["sfft"]}, ConfigError, "no step is called sfft"),
        ({"where": "docker"}, PipelineError, "no store to publish to"),
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


def test_importing_pipelines_imports_neither_kfp_nor_torch():
    code = "import pipelines, sys; print({'kfp', 'torch', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
