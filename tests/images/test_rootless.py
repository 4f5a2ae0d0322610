"""Engines that run as their user: whose the files are that containers write."""

import os

import pytest

from tests.images.scripts import load

OWN = f"{os.getuid()}:{os.getgid()}"


@pytest.mark.parametrize(
    ("command", "said", "given"),
    [
        ("podman", "true", ["--userns=keep-id", "--user", OWN]),
        ("podman", "false", ["--user", OWN]),
        ("docker", "[name=seccomp,profile=default name=rootless]", ["--user", "0:0"]),
        ("docker", "[name=seccomp,profile=default]", ["--user", OWN]),
    ],
)
def test_what_the_service_writes_belongs_to_who_started_it(monkeypatch, command, said, given):
    """As Podman 4.3 and Docker 20.10 answered, with and without root."""
    run = load("run")
    build = load("build")
    asked = []
    monkeypatch.setattr(build, "output", lambda words, what: asked.append(words) or said)
    monkeypatch.setattr(run, "is_rootless", build.is_rootless)
    assert run._as_me(command) == given
    assert asked[0][:2] == [command, "info"]
