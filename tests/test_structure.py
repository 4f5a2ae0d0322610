"""The layout and the direction of imports, and that the check of them can fail."""

import shutil

import pytest

from tests.support import structure


@pytest.mark.parametrize("check", ["broken_configuration", "stale_files"])
def test_configuration_and_generated_files_are_whole(check):
    assert list(getattr(structure, check)()) == []


@pytest.mark.parametrize("check", ["missing", "wrong_imports"])
def test_layout_and_imports_are_right(check):
    assert list(getattr(structure, check)(structure.ROOT)) == []


def test_a_missing_folder_and_an_import_the_wrong_way_are_named(tmp_path):
    for name in ("dpo", "components", "pipelines"):
        shutil.copytree(structure.ROOT / name, tmp_path / name)
    (tmp_path / "dpo" / "data" / "bad.py").write_text("def f():\n    from dpo.train import step\n")
    (tmp_path / "pipelines" / "bad.py").write_text("import dpo.modeling.load\n")
    assert list(structure.wrong_imports(tmp_path)) == [
        "dpo/data/bad.py, line 2: data must not import train",
        "pipelines/bad.py, line 1: pipelines must not import modeling",
    ]
    assert "the folder config/ is missing" in list(structure.missing(tmp_path))
