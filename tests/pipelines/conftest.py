"""What tests share that run a pipeline with kfp.local in their own process."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
from kfp import local


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
