"""What is passed on to the engine when images are built."""

import pytest

from tests.images.scripts import load

build = load("build")


def test_no_credentials_of_a_package_index_get_into_an_image(monkeypatch, tmp_path, capsys):
    """`docker history` shows them to whoever has the image."""
    started = []
    monkeypatch.setattr(build, "output", lambda command, what: started.append(command) or "")
    monkeypatch.setattr(build, "silent", lambda command: "inspect" not in command)
    monkeypatch.setattr(build, "engine", lambda: "docker")
    monkeypatch.setattr(build, "_write_names", lambda names: None)
    monkeypatch.setenv("PIP_INDEX_URL", "https://me:hunter2@pypi.test/simple")
    assert build.main(["build", "--image", "data", "--base", "b:1"]) == 1
    assert "PIP_INDEX_URL has credentials in it" in capsys.readouterr().err
    assert not any("hunter2" in word for command in started for word in command)


@pytest.mark.parametrize("index", ["https://pypi.test/simple", "http://127.0.0.1:3141/a@b/simple"])
def test_other_indexes_are_passed_on(index):
    assert build.without_password(index) == index
