"""``make docker-run`` and ``make toy-trigger``: a POST to the service becomes a published model."""

import os
import subprocess
import sys

import pytest

from tests.images.scripts import load
from tests.support.checkout import ROOT
from tests.support.programs import free_port

pytestmark = pytest.mark.containers


@pytest.fixture
def script(tmp_path, monkeypatch):
    """``images/run.py`` with a folder and names of its own: the user's containers go on."""
    build, run = load("build"), load("run")
    # not in another engine while this one is away
    build._ENGINES = ("docker",)
    try:
        command = build.engine()
    except build.ImageError as error:
        pytest.skip(str(error))
    assert build.main(["build", "--image", "service", "--image", "train"]) == 0
    monkeypatch.setattr(run, "FOLDER", tmp_path / "docker")
    monkeypatch.setattr(run, "SERVICE", f"dpo-test-service-{os.getpid()}")
    monkeypatch.setattr(run, "WORKER", f"dpo-test-worker-{os.getpid()}")
    # set by start() for the containers; put back afterwards
    monkeypatch.setenv("DPO_SERVICE_TOKEN", "")
    yield run
    run._remove(command)


def test_a_post_to_the_containers_ends_in_a_published_model(script, tmp_path, capsys):
    port = free_port()
    assert script.main(["start", "--port", str(port), "--preset", "toy"]) == 0
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out
    token = (tmp_path / "docker/token").read_text().strip()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pipelines.service.toy", "trigger"),
            *("--url", f"http://127.0.0.1:{port}"),
        ],
        cwd=ROOT,
        env={**os.environ, "DPO_SERVICE_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "docker/store").rglob("model.safetensors")), done.stdout
