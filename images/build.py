"""Builds, pushes and checks the images with Docker or Podman, whichever is there.

    python images/build.py build                  three images, tagged by what is in them
    python images/build.py push --registry HOST/PATH
    python images/build.py check                  each as a random user, read-only, without network
    python images/build.py sizes                  what fills them

``build`` and ``push`` write ``build/images.json``, which ``submit.py --images`` reads. Where no
registry is reachable, ``images/base.sh`` makes a base image from Debian packages first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ("data", "train", "service")
NAMES = ROOT / "build" / "images.json"
OFFLINE_BASE = "dpo-base:bookworm"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
_MOST_MIB = {"data": 1_100, "train": 8_000, "service": 1_000}
"""Sizes above these fail the check: something came in that nobody meant."""


class ImageError(Exception):
    """An engine that is missing, or a command of it that failed; the text says what to do."""


def engine() -> str:
    """Command of a container engine that answers.

    Raises:
        ImageError: there is none.
    """
    for name in ("docker", "podman"):
        if shutil.which(name) and _silent([name, "info"]):
            return name
    raise ImageError(
        "no container engine answers: install one (Debian: apt-get install docker.io) and start "
        "it, or point DOCKER_HOST at its socket"
    )


def _silent(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _output(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"{what}: {(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout.strip()


def write_context(folder: Path) -> str:
    """Copy what goes into the images to ``folder``; returns the tag: a hash of it all."""
    for source in ("dpo", "components", "pipelines", "config"):
        shutil.copytree(ROOT / source, folder / source, ignore=_LEFT_OUT)
    (folder / "images").mkdir()
    for file in ("Dockerfile", "init.py", "requirements.lock", "smollm2.lock"):
        shutil.copyfile(ROOT / "images" / file, folder / "images" / file)
    for image in IMAGES:
        (folder / "images" / image).mkdir()
        lock = f"images/{image}/requirements.lock"
        shutil.copyfile(ROOT / lock, folder / lock)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    certificates = os.environ.get("SSL_CERT_FILE")
    if certificates and Path(certificates).is_file():
        shutil.copyfile(certificates, folder / "images" / "certificates.pem")
    return digest.hexdigest()[:12]


def bases(command: str, base: str | None, build: str | None) -> tuple[str, str]:
    """Base image and the one that packages are installed in."""
    if base is None and _silent([command, "image", "inspect", OFFLINE_BASE]):
        base = OFFLINE_BASE
    if base is None:
        base = "python:3.11-slim"
    if build is None:
        build = "dpo-base-build:bookworm" if base == OFFLINE_BASE else base
    return base, build


def build(options: argparse.Namespace) -> int:
    """Build the images and write their names."""
    command = engine()
    base, builder = bases(command, options.base, options.build_base)
    names = {}
    with tempfile.TemporaryDirectory() as folder:
        tag = write_context(Path(folder))
        for image in options.image or IMAGES:
            names[image] = f"dpo-{image}:{tag}"
            if _silent([command, "image", "inspect", names[image]]):
                print(f"{names[image]} is there")
                continue
            print(f"building {names[image]} on {base} ...", flush=True)
            arguments = {
                "IMAGE": image,
                "BASE_IMAGE": base,
                "BUILD_IMAGE": builder,
                "BASE_DIGEST": _digest(command, base),
                **_version(),
            }
            if index := os.environ.get("PIP_INDEX_URL"):
                arguments["PIP_INDEX_URL"] = index
            given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
            file = str(Path(folder, "images", "Dockerfile"))
            target = ["-f", file, "-t", names[image], folder]
            _output(
                [command, "build", "--network", "host", *given, *target],
                f"the {image} image could not be built",
            )
    _write_names(names)
    return 0


def _version() -> dict[str, str]:
    """Revision and date of the checkout, the same for each build of one commit.

    Files carry SOURCE_DATE_EPOCH, by default 0: a date that moved with each commit would make the
    layer of packages anew.
    """
    git = ["git", "-C", str(ROOT)]
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    revision, seconds = "unknown", epoch
    if _silent([*git, "rev-parse", "HEAD"]):
        revision = _output([*git, "rev-parse", "HEAD"], "git")
        seconds = epoch or _output([*git, "log", "-1", "--format=%ct"], "git")
    sys.path.insert(0, str(ROOT))
    from dpo import __version__

    return {
        "REVISION": revision,
        "VERSION": __version__,
        "SOURCE_DATE_EPOCH": epoch or "0",
        "CREATED": datetime.fromtimestamp(int(seconds or 0), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _digest(command: str, image: str) -> str:
    if not _silent([command, "image", "inspect", image]):
        _output([command, "pull", image], f"the base image {image} could not be had")
    return _output([command, "image", "inspect", "--format", "{{.Id}}", image], "inspect")


def _write_names(names: dict[str, str]) -> None:
    known = json.loads(NAMES.read_text()) if NAMES.is_file() else {}
    NAMES.parent.mkdir(exist_ok=True)
    NAMES.write_text(json.dumps({**known, **names}, indent=1) + "\n")
    print(f"names: {NAMES.relative_to(ROOT)}")


def read_names() -> dict[str, str]:
    """The names that ``build`` or ``push`` wrote.

    Raises:
        ImageError: neither has run.
    """
    if not NAMES.is_file():
        raise ImageError("no images were built: run `make images`")
    names: dict[str, str] = json.loads(NAMES.read_text())
    return names


def push(options: argparse.Namespace) -> int:
    """Push the built images and write their digests."""
    command = engine()
    digests = {}
    for image, name in read_names().items():
        tag = name.rpartition("/")[2]
        target = f"{options.registry.rstrip('/')}/{tag}"
        _output([command, "tag", name, target], "tag")
        print(f"pushing {target} ...", flush=True)
        _output([command, "push", target], f"{target} could not be pushed")
        listed = _output(
            [command, "image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', target],
            "inspect",
        )
        repository = target.rpartition(":")[0]
        digests[image] = next(d for d in listed.split() if d.startswith(f"{repository}@"))
    _write_names(digests)
    return 0


_TINY_DATA = (
    'dpo ingest datasets=[hh_sample] model=tiny "max_length=64" "max_prompt_length=32" '
    "output=/tmp/data && test -f /tmp/data/manifest.json"
)
_COMMANDS = {
    "data": [
        "python3 -m dpo ingest --help",
        "python3 -c 'import importlib.util as u; assert u.find_spec(\"torch\") is None'",
        "python3 -m " + _TINY_DATA,
    ],
    "train": [
        "python3 -m dpo train --help",
        "python3 -m " + _TINY_DATA + " && python3 -m dpo train loss=sft model=tiny data=/tmp/data "
        "n_examples=16 batch_size=8 max_length=64 max_prompt_length=32 output=/tmp/sft "
        "&& test -f /tmp/sft/manifest.json",
    ],
    "service": [
        "python3 -m pipelines.submit --help",
        "python3 -c 'import importlib.util as u; assert u.find_spec(\"torch\") is None'",
        "python3 -m pipelines.submit --local --list",
    ],
}
_EVERYWHERE = [
    'test "$(id -u)" -ge 1000000',
    "! touch /opt/dpo/mark 2>/dev/null",
    "for tool in gcc cc pip make; do ! command -v $tool || exit 1; done",
    "python3 -c 'import kfp'",
]


def check(options: argparse.Namespace) -> int:
    """Run each image as a cluster with strict rules would, and what its steps do."""
    command = engine()
    names = read_names()
    for image in options.image or IMAGES:
        user = str(random.randint(1_000_000, 2_000_000))
        strict = [
            *(
                command,
                "run",
                "--rm",
                "--read-only",
                "--tmpfs",
                "/tmp:size=1g",
                "--network",
                "none",
            ),
            *("--user", f"{user}:0", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            names[image],
        ]
        for line in [*_EVERYWHERE, *_COMMANDS[image]]:
            _output([*strict, "sh", "-c", line], f"{image} as user {user}: {line}")
        size = _mebibytes(command, names[image])
        if size > _MOST_MIB[image]:
            raise ImageError(f"{image} is {size} MiB, more than the {_MOST_MIB[image]} allowed")
        print(f"{image}: {size} MiB, runs as user {user}, read-only, no network, no capabilities")
    return 0


def _mebibytes(command: str, name: str) -> int:
    return int(_output([command, "image", "inspect", "--format", "{{.Size}}", name], "size")) >> 20


_LARGEST = "du -sm /opt/venv/lib/python3*/site-packages/* /usr /opt/dpo | sort -rn | head -12"


def sizes(options: argparse.Namespace) -> int:
    """Print each image's size and the largest packages in it."""
    command = engine()
    names = read_names()
    for image in options.image or IMAGES:
        print(f"{image}: {_mebibytes(command, names[image])} MiB")
        listed = _output([command, "run", "--rm", names[image], "sh", "-c", _LARGEST], "du")
        for line in listed.splitlines():
            size, path = line.split("\t")
            print(f"  {size:>6} MiB  {path.rpartition('site-packages/')[2]}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function in (build, push, check, sizes):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--image", action="append", choices=IMAGES, help="only this one")
        if function is build:
            command.add_argument("--base", help="base image (default: python:3.11-slim)")
            command.add_argument("--build-base", help="image to install packages in")
        if function is push:
            command.add_argument("--registry", required=True, help="such as ghcr.io/me")
    options = parser.parse_args(arguments)
    try:
        return int(options.function(options))
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
