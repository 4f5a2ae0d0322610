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


@pytest.mark.parametrize(("docker", "expected"), [("podman", "podman"), ("Docker", "docker")])
def test_podman_under_docker_s_name_is_taken_as_podman(docker, expected, tmp_path, monkeypatch):
    """With the package podman-docker; it was asked in Docker's way and ended in an error."""
    for name, says in (("docker", docker), ("podman", "podman")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says} version 4.3.1'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert load("build").engine() == expected
