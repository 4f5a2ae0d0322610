"""The service and a worker in containers on this machine; what ``make docker-run`` starts.

    python images/run.py start [--port 8000] [--preset toy]
    python images/run.py clean

Two containers share ``runs/docker``: the service from the ``service`` image, and from the ``train``
image a worker that carries out the runs. The service asks for the token in ``runs/docker/token``.
"""

from __future__ import annotations

import argparse
import http.client
import os
import secrets
import sys
import time
from pathlib import Path

from build import NAMES, ROOT, ImageError, engine, is_rootless, output, read_names, silent

FOLDER = ROOT / "runs" / "docker"
SERVICE, WORKER = "dpo-service", "dpo-worker"
_READY_SECONDS = 180.0
_STRICT = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--shm-size", "1g"),
)
_PASSED_ON = ("AWS_", "S3_", "MINIO_", "HF_", "DPO_SERVICE_", "OMP_NUM_THREADS")


def start(options: argparse.Namespace) -> int:
    """Start both and wait until the service and the worker are ready."""
    command, names = engine(), read_names()
    for image in ("service", "train"):
        if not silent([command, "image", "inspect", names.get(image, "none")]):
            raise ImageError(f"the {image} image is not here: run `make docker-build`")
    token = _token()
    _remove(command)
    shared = _shared(command, options, token)
    port = ["--publish", f"127.0.0.1:{options.port}:8000"]
    service = ["python3", "-m", "pipelines.service", "--no-worker"]
    worker = ["python3", "-m", "pipelines.service.worker"]
    started = [command, "run", "--detach", "--restart", "unless-stopped"]
    output([*started, "--name", SERVICE, *port, *shared, names["service"], *service], "docker run")
    output([*started, "--name", WORKER, *shared, names["train"], *worker], "docker run")
    _wait_until_ready(command, options.port)
    print(f"The service: http://127.0.0.1:{options.port}  (token: {FOLDER / 'token'})")
    print("Next: make toy-trigger        make docker-clean ends both")
    return 0


def _token() -> str:
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "token"
    if not file.is_file():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(24) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _shared(command: str, options: argparse.Namespace, token: str) -> list[str]:
    """What both containers are started with; secrets go by name, so that no argument shows them."""
    os.environ["DPO_SERVICE_TOKEN"] = token
    given = {
        "DPO_SERVICE_HOST": "0.0.0.0",
        "DPO_SERVICE_PORT": "8000",
        "DPO_SERVICE_DATA_DIR": "/data",
        "DPO_SERVICE_PRESET": options.preset,
        "DPO_CACHE_DIR": "/data/cache",
        # what is written there belongs to whoever started this
        "HF_HOME": "/data/cache/huggingface",
    }
    passed = sorted(n for n in os.environ if n.startswith(_PASSED_ON) and n not in given)
    return [
        *_STRICT,
        *("--tmpfs", "/tmp:size=2g", *_as_me(command)),
        *("--volume", f"{FOLDER}:/data"),
        *(f"--env={name}={value}" for name, value in given.items()),
        *(part for name in passed for part in ("--env", name)),
    ]


def _as_me(command: str) -> list[str]:
    """Who runs in the containers: whoever starts them, so that the files are theirs."""
    own = f"{os.getuid()}:{os.getgid()}"
    if not is_rootless(command):
        return ["--user", own]
    # root in there is the user outside, unless ids are kept
    return ["--userns=keep-id", "--user", own] if command == "podman" else ["--user", "0:0"]


def _wait_until_ready(command: str, port: int) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        if _ready(port):
            return
        time.sleep(0.5)
    logs = [output([command, "logs", "--tail", "20", name], "logs") for name in (SERVICE, WORKER)]
    raise ImageError("the service did not become ready:\n" + "\n".join(logs))


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _remove(command: str) -> None:
    for name in (SERVICE, WORKER):
        if silent([command, "container", "inspect", name]):
            silent([command, "stop", name])
            output([command, "rm", "--force", "--volumes", name], "rm")


def clean(_: argparse.Namespace) -> int:
    """End both, and remove the images that were built here; published models stay."""
    command = engine()
    _remove(command)
    listed = output([command, "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], "image ls")
    ours = {f"dpo-{image}" for image in ("data", "train", "service")}
    # podman puts a host before the names that have none
    names = [
        line
        for line in listed.splitlines()
        if line.removeprefix("localhost/").partition(":")[0] in ours
    ]
    if names:
        output([command, "image", "rm", "--force", *names], "image rm")
    for file in (NAMES, FOLDER / "token"):
        file.unlink(missing_ok=True)
    print(f"removed the containers and {len(names)} images; {_shown(FOLDER)} keeps what was made")
    return 0


def _shown(path: Path) -> Path:
    return path.relative_to(ROOT)


def main(arguments: list[str] | None = None) -> int:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function in (start, clean):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        if function is start:
            command.add_argument("--port", type=int, default=8000)
            command.add_argument("--preset", default="toy", help="pipeline parameters")
    options = parser.parse_args(arguments)
    try:
        return int(options.function(options))
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
