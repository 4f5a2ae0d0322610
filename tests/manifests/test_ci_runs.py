"""The snippets for CI as their runners start them: a shell that stops at the first error."""

import json
import os
import subprocess
import sys

import pytest

from tests.manifests.test_ci import script
from tests.pipelines.conftest import backend  # noqa: F401  # the stand-in of the API
from tests.support.checkout import ROOT
from tests.support.kfp_backend import STEPS, Scenario
from tests.support.workflow import task

# as their documentation says that they start a script
SHELLS = {"github.yaml": ["bash", "-e"], "gitlab.yaml": ["bash", "-eo", "pipefail"]}
VARIABLES = {
    "BETA": "0.2",
    "DATA_IMAGE": "registry.example/data:1",
    "TRAIN_IMAGE": "registry.example/train:1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "GITHUB_REF_NAME": "main",
    "GITHUB_RUN_NUMBER": "7",
    "CI_COMMIT_REF_SLUG": "main",
    "CI_PIPELINE_IID": "7",
}


def execute(name, folder, python, **variables):
    """Run a snippet with ``python`` as that command; exit code, outcome.json, outputs, its text."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "bin" / "python").chmod(0o755)
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    (folder / "script").write_text(script(name))
    outputs = folder / "outputs"
    outputs.touch()
    done = subprocess.run(
        [*SHELLS[name], "script"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            **VARIABLES,
            **variables,
            "GITHUB_OUTPUT": str(outputs),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        },
    )
    outcome = json.loads((folder / "outcome.json").read_text())
    return done.returncode, outcome, outputs.read_text(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "ends", "output", "words"),
    [
        (0, 0, "published=true\n", ""),
        (3, 0, "published=false\n", "::warning::the gate refused the model"),
        (5, 5, "", "::error::not known to have ended; the run may go on in Kubeflow"),
        *((code, code, "", "") for code in (1, 2, 4, 130)),
    ],
)
def test_what_each_exit_code_becomes(tmp_path, code, ends, output, words):
    python = f"echo '{{\"exit_code\": {code}}}'; exit {code}"
    for name in SHELLS:
        folder = tmp_path / name
        folder.mkdir()
        found, outcome, outputs, said = execute(name, folder, python)
        assert outcome == {"exit_code": code}
        if name == "gitlab.yaml":
            # allow_failure makes a warning of 3
            assert found == code
            continue
        assert (found, outputs) == (ends, output)
        assert words in said


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "approved", "code"), [("github.yaml", True, 0), ("gitlab.yaml", False, 3)]
)
def test_a_snippet_submits_its_run_and_tells_how_it_ended(
    backend,  # noqa: F811
    tmp_path,
    name,
    approved,
    code,
):
    rows = [r for s in STEPS if approved or s != "publish" for r in task(s, "SUCCEEDED")]
    backend.scenario = Scenario(tasks=[rows])
    backend.token = "of-ci"
    folder = tmp_path / "job"
    folder.mkdir()
    token = {"KF_PIPELINES_TOKEN": "of-ci", "PYTHONPATH": str(ROOT)}
    found, outcome, _, said = execute(name, folder, f'exec {sys.executable} "$@"', **token)
    assert found == code, said
    assert outcome["exit_code"] == code
    (run,) = backend.runs.values()
    assert run["display_name"] == "main-7"
    parameters = run["runtime_config"]["parameters"]
    assert (parameters["preference_beta"], parameters["publish_store"]) == (0.2, "s3://models/team")
    spec = run["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"]
    assert spec["exec-sft"]["container"]["image"] == VARIABLES["TRAIN_IMAGE"]
    variables = {item["name"]: item["value"] for item in spec["exec-publish"]["container"]["env"]}
    assert variables["S3_ENDPOINT"] == VARIABLES["AWS_ENDPOINT_URL"]
