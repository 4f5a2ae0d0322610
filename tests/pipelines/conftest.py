"""What tests share that run a pipeline with kfp.local in their own process, or submit one."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp import local

from pipelines import submit, watch
from tests.support.kfp_backend import Backend, running_backend
from tests.support.submitted import IMAGES


@pytest.fixture
def kfp_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """kfp.local runs steps as processes, without its cache; the folder where outputs will lie."""
    # KFP indents what a step prints by replacing print() while it runs. Steps of a loop run in
    # threads, and each puts back what it found: another thread's.
    monkeypatch.setattr(builtins, "print", builtins.print)
    root = tmp_path / "root"
    local.init(
        local.SubprocessRunner(use_venv=False), pipeline_root=str(root), enable_caching=False
    )
    return root


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Backend]:
    """The stand-in of the API, which the environment names."""
    for name in [name for name in os.environ if name.startswith("KF_PIPELINES")]:
        monkeypatch.delenv(name)
    # kfp keeps a context file in the home folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    # where the stand-in's runs leave their verdict
    monkeypatch.setenv("DPO_SHARED_FOLDER", str(tmp_path))
    with running_backend() as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        yield server


@pytest.fixture
def store(tmp_path: Path) -> str:
    """URL of the store that the stand-in's runs publish to."""
    return (tmp_path / "store").as_uri()


@pytest.fixture
def command(
    store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, Any, str]]:
    """Runs ``submit.py``; returns exit code, the JSON object and what stderr said."""
    monkeypatch.setattr(watch, "_FIRST_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watch, "_POLL_SECONDS", 0.02)
    # a compilation of seconds, which has a test of its own
    monkeypatch.setattr(submit, "_check_package_is_current", lambda: None)

    def run(*arguments: str) -> tuple[int, Any, str]:
        code = submit.main([*IMAGES, "--store", store, "--output", "json", *arguments])
        printed = capsys.readouterr()
        assert printed.out.count("\n") == 1, "one JSON object and nothing else on stdout"
        outcome = json.loads(printed.out)
        assert outcome.get("exit_code", code) == code
        return code, outcome, printed.err

    return run
