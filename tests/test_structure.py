"""The layout that `make validate-structure` checks, and that the check can fail."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import structure


@pytest.mark.parametrize("check", ["broken_configuration", "stale_files"])
def test_configuration_and_generated_files_are_whole(check):
    assert list(getattr(structure, check)()) == []


def test_every_folder_and_file_is_there_and_a_missing_one_is_named(tmp_path):
    assert list(structure.missing(structure.ROOT)) == []
    (tmp_path / "dpo").mkdir()
    assert "the folder config/ is missing" in list(structure.missing(tmp_path))
    assert "the folder dpo/ is missing" not in list(structure.missing(tmp_path))


@pytest.mark.parametrize(
    ("made", "words"),
    [(False, "is older: pass PYTHON="), (True, ".venv was made by an older one: remove it")],
)
def test_a_python_that_is_too_old_is_named_before_anything_is_installed(made, words, tmp_path):
    """It answers the question for its version as an older one does, and nothing else."""
    root = Path(__file__).parents[1]
    (tmp_path / "images").mkdir()
    for name in ("Makefile", "pyproject.toml", "images/requirements.lock"):
        shutil.copyfile(root / name, tmp_path / name)
    old = tmp_path / (".venv/bin/python" if made else "old")
    old.parent.mkdir(parents=True, exist_ok=True)
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    command = ["make", "setup", *([] if made else [f"PYTHON={old}"])]
    # not as a part of the make that runs the tests, which would tell of folders
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Python 3.11 or newer is needed, and ")
    assert words in done.stderr
    assert (tmp_path / ".venv").exists() == made
