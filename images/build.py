"""Builds, pushes and checks the images with Docker or Podman, whichever is there.

    python images/build.py build [--tag TAG]      three images, tagged by what is in them
    python images/build.py push --registry HOST/PATH
    python images/build.py pushed --registry HOST/PATH    that the noted names are digests there
    python images/build.py sizes                  what fills them

``build`` and ``push`` write ``build/images.json``, which ``submit.py --images`` reads. Where no
registry is reachable, ``images/base.sh`` makes a base image from Debian packages first.
``images/check.py`` runs the images as a cluster with strict rules would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ("data", "train", "service")
NAMES = ROOT / "build" / "images.json"
OFFLINE_BASE = "dpo-base:bookworm"
ONLINE_BASE = "python:3.11-slim"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
_ENGINES = ("docker", "podman", "nerdctl")


class ImageError(Exception):
    """An engine that is missing, or a command of it that failed; the text says what to do."""


def engine() -> str:
    """Command of a container engine that answers.

    Raises:
        ImageError: there is none.
    """
    for name in _ENGINES:
        if shutil.which(name) and silent([name, "info"]) and not _is_podman(name):
            return name
    raise ImageError(
        "no container engine answers: install one (Debian, as root: make setup-system) and start "
        "it (make engine starts one of its own), or point DOCKER_HOST at its socket"
    )


def _is_podman(command: str) -> bool:
    """Whether it is Podman under Docker's name (podman-docker), which answers as Podman does."""
    return command == "docker" and "podman" in output([command, "--version"], "docker --version")


def is_rootless(command: str) -> bool:
    """Whether the engine runs as its user: then only some ids exist in containers, and root there
    is the user outside."""
    told = "{{.Host.Security.Rootless}}" if command == "podman" else "{{.SecurityOptions}}"
    found = output([command, "info", "--format", told], f"{command} info")
    return found == "true" or "name=rootless" in found


def silent(command: list[str]) -> bool:
    """Whether a command succeeds; nothing of it is shown."""
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def output(command: list[str], what: str) -> str:
    """What a command prints.

    Raises:
        ImageError: it failed; ``what`` says what was tried.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"{what}: {(done.stdout + done.stderr).strip()[-2000:]}")
    return done.stdout.strip()


def write_context(folder: Path) -> str:
    """Copy what goes into the images to ``folder``; returns the tag: a hash of it all."""
    for source in ("dpo", "components", "pipelines", "config"):
        shutil.copytree(ROOT / source, folder / source, ignore=_LEFT_OUT)
    (folder / "images").mkdir()
    for file in ("Dockerfile", "init.py", "packages.sh", "requirements.lock", "smollm2.lock"):
        shutil.copyfile(ROOT / "images" / file, folder / "images" / file)
    for image in IMAGES:
        (folder / "images" / image).mkdir()
        lock = f"images/{image}/requirements.lock"
        shutil.copyfile(ROOT / lock, folder / lock)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    _write_pip(folder / "images" / "pip.zip")
    certificates = os.environ.get("SSL_CERT_FILE")
    if certificates and Path(certificates).is_file():
        shutil.copyfile(certificates, folder / "images" / "certificates.pem")
    return digest.hexdigest()[:12]


def _write_pip(target: Path) -> None:
    """The pip that runs here: neither base image nor result needs one. Always the same bytes."""
    import pip

    package = Path(pip.__file__).parent
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(package.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                name = zipfile.ZipInfo(path.relative_to(package.parent).as_posix())
                archive.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED, 1)


def base_image(command: str, wished: str | None) -> str:
    """The base image: the wished one, the public one, or one made of Debian packages.

    Raises:
        ImageError: the public one cannot be pulled and none can be made.
    """
    if wished:
        return wished
    for name in (OFFLINE_BASE, ONLINE_BASE):
        if silent([command, "image", "inspect", name]):
            return name
    if silent([command, "pull", ONLINE_BASE]):
        return ONLINE_BASE
    print(f"{ONLINE_BASE} cannot be pulled: making {OFFLINE_BASE} of Debian packages", flush=True)
    output(
        [str(ROOT / "images" / "base.sh"), command],
        f"no base image: neither could {ONLINE_BASE} be pulled nor one be made "
        "(name one that is here: BASE=...)",
    )
    return OFFLINE_BASE


def build(options: argparse.Namespace) -> int:
    """Build the images and write their names."""
    command = engine()
    base = base_image(command, options.base)
    digest = _digest(command, base)
    names = {}
    with tempfile.TemporaryDirectory() as folder:
        tag = write_context(Path(folder))
        for image in options.image or IMAGES:
            names[image] = f"dpo-{image}:{tag}"
            if _is_built(command, names[image], digest):
                print(f"{names[image]} is there")
            else:
                _build_one(command, base, digest, names[image], Path(folder))
            if options.tag:
                names[image] = f"dpo-{image}:{options.tag}"
                output([command, "tag", f"dpo-{image}:{tag}", names[image]], "tag")
    _write_names(names)
    return 0


def _is_built(command: str, name: str, base_digest: str) -> bool:
    """Whether the image is here, and on this base: its name tells only what went into it."""
    if not silent([command, "image", "inspect", name]):
        return False
    return label(command, name, "base.digest") == base_digest


def label(command: str, name: str, key: str) -> str:
    """What an image says of itself under ``org.opencontainers.image.``; empty: nothing."""
    form = f'{{{{index .Config.Labels "org.opencontainers.image.{key}"}}}}'
    return output([command, "image", "inspect", "--format", form, name], "inspect")


def _build_one(command: str, base: str, base_digest: str, name: str, context: Path) -> None:
    image = name.partition(":")[0].removeprefix("dpo-")
    print(f"building {name} on {base} ...", flush=True)
    started = time.monotonic()
    arguments = {
        "IMAGE": image,
        "BASE_IMAGE": base,
        "BASE_DIGEST": base_digest,
        **_version(),
    }
    if index := os.environ.get("PIP_INDEX_URL"):
        arguments["PIP_INDEX_URL"] = without_password(index)
    given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
    target = ["-f", str(context / "images" / "Dockerfile"), "-t", name, str(context)]
    output(
        [command, "build", "--network", "host", *given, *target],
        f"the {image} image could not be built",
    )
    print(f"built {name} in {time.monotonic() - started:.0f} s", flush=True)


def without_password(index: str) -> str:
    """The address of a package index that an image may tell of.

    Raises:
        ImageError: it has credentials in it: whoever pulls the image reads what it was built with.
    """
    if "@" in urlsplit(index).netloc:
        raise ImageError(
            "PIP_INDEX_URL has credentials in it, and the history of an image keeps what it was "
            "built with: name an index that asks for none from here (a mirror or a proxy on this "
            "machine; images are built in its network)"
        )
    return index


def _version() -> dict[str, str]:
    """Revision (``-dirty`` where files differ from it) and date of the checkout.

    Files carry SOURCE_DATE_EPOCH, by default 0: a date that moved with each commit would make the
    layer of packages anew.
    """
    git = ["git", "-C", str(ROOT)]
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    revision, seconds = "unknown", epoch
    if silent([*git, "rev-parse", "HEAD"]):
        # as dpo/storage/provenance.py notes it of a checkout
        describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        revision = output([*git, *describe], "git")
        seconds = epoch or output([*git, "log", "-1", "--format=%ct"], "git")
    sys.path.insert(0, str(ROOT))
    from dpo import __version__

    return {
        "REVISION": revision,
        "VERSION": __version__,
        "SOURCE_DATE_EPOCH": epoch or "0",
        "CREATED": datetime.fromtimestamp(int(seconds or 0), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _digest(command: str, image: str) -> str:
    if not silent([command, "image", "inspect", image]):
        output([command, "pull", image], f"the base image {image} could not be had")
    return output([command, "image", "inspect", "--format", "{{.Id}}", image], "inspect")


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
        target = f"{options.registry.rstrip('/')}/{_tagged(name)}"
        if "@" in name and not silent([command, "image", "inspect", name]):
            # Podman does not know what it pushed by the digest that the registry has
            output([command, "pull", name], f"{name} could not be pulled")
        output([command, "tag", name, target], "tag")
        print(f"pushing {target} ...", flush=True)
        digests[image] = f"{target.rpartition(':')[0]}@{_push(command, target)}"
    _write_names(digests)
    return 0


def _push(command: str, target: str) -> str:
    """Push an image; returns the digest that the registry has it under."""
    failed = f"{target} could not be pushed"
    if command == "podman":
        # it compresses layers while it pushes, and goes on to show the digest of those before
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "digest"
            output([command, "push", "--digestfile", str(told), target], failed)
            return told.read_text(encoding="utf-8").strip()
    output([command, "push", target], failed)
    form = '{{join .RepoDigests "\\n"}}'
    listed = output([command, "image", "inspect", "--format", form, target], "inspect")
    start = f"{target.rpartition(':')[0]}@"
    return next(d for d in listed.split() if d.startswith(start)).removeprefix(start)


def _tagged(name: str) -> str:
    """A name by its last part and a tag; of one that was pushed the digest takes its place."""
    image, _, digest = name.rpartition("/")[2].partition("@sha256:")
    return f"{image}:{digest[:12]}" if digest else image


def pushed(options: argparse.Namespace) -> int:
    """Say whether the noted names are digests in the registry."""
    registry = options.registry.rstrip("/")
    names = read_names()
    for image in IMAGES:
        if not names.get(image, "").startswith(f"{registry}/") or "@sha256:" not in names[image]:
            raise ImageError(
                f"the {image} image was not pushed to {registry} from here: run "
                f"`make images-push REGISTRY={registry}` first, or name images that are there: "
                "`make pipeline DATA_IMAGE=... TRAIN_IMAGE=...`"
            )
    return 0


def mebibytes(command: str, name: str) -> int:
    """Size of an image."""
    return int(output([command, "image", "inspect", "--format", "{{.Size}}", name], "size")) >> 20


_LARGEST = "du -sm /opt/venv/lib/python3*/site-packages/* /usr /opt/dpo | sort -rn | head -12"


def sizes(options: argparse.Namespace) -> int:
    """Print each image's size and the largest packages in it."""
    command = engine()
    names = read_names()
    for image in options.image or IMAGES:
        print(f"{image}: {mebibytes(command, names[image])} MiB")
        listed = output([command, "run", "--rm", names[image], "sh", "-c", _LARGEST], "du")
        for line in listed.splitlines():
            size, path = line.split("\t")
            print(f"  {size:>6} MiB  {path.rpartition('site-packages/')[2]}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for function in (build, push, pushed, sizes):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--image", action="append", choices=IMAGES, help="only this one")
        if function is build:
            command.add_argument("--base", help="base image (default: python:3.11-slim)")
            command.add_argument("--tag", help="name them by this tag as well")
        if function in (push, pushed):
            command.add_argument("--registry", required=True, help="such as ghcr.io/me")
    options = parser.parse_args(arguments)
    try:
        return int(options.function(options))
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
