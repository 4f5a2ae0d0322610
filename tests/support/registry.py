"""A real container registry on loopback, Debian's package ``docker-registry``."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.programs import NotHere, ended_with_us, free_port

_READY_SECONDS = 60.0
_MANIFESTS = ", ".join(
    [
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
    ]
)


@contextlib.contextmanager
def running_registry(folder: Path) -> Iterator[str]:
    """``host:port`` of a registry that runs inside the block.

    Raises:
        NotHere: the server is not installed or does not start.
    """
    server = shutil.which("docker-registry")
    if server is None:
        raise NotHere("docker-registry was not found: apt-get install docker-registry")
    address = f"127.0.0.1:{free_port()}"
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": address},
    }
    # JSON is YAML
    (folder / "config.yml").write_text(json.dumps(settings), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ended_with_us(server, "serve", str(folder / "config.yml")),
            stdout=log,
            stderr=log,
        )
    try:
        _wait(address, process)
        yield address
    finally:
        process.kill()
        process.wait()


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
            return
        time.sleep(0.1)
    raise NotHere("docker-registry did not start")


def digest(address: str, repository: str, tag: str) -> str:
    """What the registry itself says is the digest behind a tag."""
    request = urllib.request.Request(
        f"http://{address}/v2/{repository}/manifests/{tag}", headers={"Accept": _MANIFESTS}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: str = answer.headers["Docker-Content-Digest"]
        return found
