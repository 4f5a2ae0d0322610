"""The layout that `make validate-structure` checks, and that the check can fail."""

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
