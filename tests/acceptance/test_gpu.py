"""The acceptance command itself, on a CPU."""

import json

import pytest
import torch

from tests.acceptance.gpu import main


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("no GPU was found")


@pytest.mark.long
def test_a_dry_run_prints_the_table(capsys, tmp_path):
    assert main(["--dry-run", "--output", str(tmp_path / "table.json")]) == 0
    shown = capsys.readouterr().out
    assert "killed: True, resumed: True, same weights: True" in shown
    assert "FAILED" not in shown
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["check"] for row in rows] == ["utilisation", "peak memory", "kill and resume"]
