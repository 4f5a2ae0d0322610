"""A container engine that does not answer."""

import pytest

from dpo.errors import RequestError
from pipelines import containers

# Docker's client leaves its socket open where nobody answers
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")


def test_before_a_run_nothing_was_started():
    with pytest.raises(RequestError, match="no container engine answers"):
        containers.connect()


def test_after_a_run_it_changes_nothing_of_how_the_run_ended(capsys):
    containers.stop_containers("20260101-000000-000000")
    assert "containers of this run may go on" in capsys.readouterr().err
