"""Runs each image as a cluster with strict rules would: any user, read-only, no network.

python images/check.py [--image NAME]
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time

from build import IMAGES, ImageError, engine, is_rootless, label, mebibytes, output, read_names

_MOST_MIB = {"data": 1_100, "train": 6_000, "service": 1_000}
"""Sizes above these fail the check: something came in that nobody meant."""
_OPENSHIFT_IDS = (1_000_000, 2_000_000)
_FEW_IDS = (1_000, 60_000)
"""Ids that exist in the containers of an engine that runs as its user."""
_STOP_SECONDS = 10
"""An init that swallowed SIGTERM would let the engine wait so long, and then kill."""
_TINY_DATA = (
    'python3 -m dpo ingest datasets=[hh_sample] model=tiny "max_length=64" "max_prompt_length=32" '
    "output=/tmp/data && test -f /tmp/data/manifest.json"
)
_TINY_TRAINING = (
    "python3 -m dpo train loss=sft model=tiny data=/tmp/data n_examples=16 batch_size=8 "
    "max_length=64 max_prompt_length=32 output=/tmp/sft && test -f /tmp/sft/manifest.json"
)
_NO_TORCH = "python3 -c 'import importlib.util as u; assert u.find_spec(\"torch\") is None'"
_COMMANDS = {
    "data": [
        "python3 -m dpo ingest --help",
        "python3 -m dpo gate --help",
        "python3 -m dpo publish --help",
        _NO_TORCH,
        _TINY_DATA,
    ],
    "train": [
        "python3 -m dpo train --help",
        "python3 -m dpo reference --help",
        "python3 -m dpo evaluate --help",
        f"{_TINY_DATA} && {_TINY_TRAINING}",
    ],
    "service": [
        "python3 -m pipelines.submit --help",
        "python3 -m pipelines.service --help",
        _NO_TORCH,
        "python3 -m pipelines.submit --local --list",
        "python3 -m pipelines.service --data-dir /tmp/service --openapi",
    ],
}
_EVERYWHERE = [
    'test -n "$DPO_COMMIT"',
    "if touch /opt/dpo/mark 2>/dev/null; then exit 1; fi",
    "for tool in gcc cc g++ ld make pip pip3; do if command -v $tool; then exit 1; fi; done",
    # what a package manager or a compiler of modules left
    "if find / -xdev -name '*.whl' 2>/dev/null | grep .; then exit 1; fi",
    "if find /root/.cache /var/cache/apt/archives /var/lib/apt/lists /build /tmp -type f -size +0 "
    "2>/dev/null | grep .; then exit 1; fi",
    "python3 -c 'import kfp, dpo, sys; sys.exit(not dpo.__file__.startswith(\"/opt/dpo\"))'",
]
_LABELS = ("title", "version", "revision", "created", "licenses", "base.name", "base.digest")


def check(command: str, image: str, name: str) -> None:
    """Try everything on one image.

    Raises:
        ImageError: the first thing that failed.
    """
    user = random.randint(*(_FEW_IDS if is_rootless(command) else _OPENSHIFT_IDS))
    strict = [
        *(command, "run", "--rm", "--read-only", "--tmpfs", "/tmp:size=1g", "--network", "none"),
        *("--user", f"{user}:0", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    ]
    # one container for all that is quick; the last line that it shows is the one that failed
    lines = [f'test "$(id -u)" = {user}', *_EVERYWHERE]
    everywhere = "set -e\n" + "\n".join(f"echo '+' {shlex.quote(line)}; {line}" for line in lines)
    output([*strict, name, "sh", "-c", everywhere], f"{image} as user {user}")
    for line in _COMMANDS[image]:
        output([*strict, name, "sh", "-c", line], f"{image} as user {user}: {line}")
    _check_signals(strict, image, name)
    for key in _LABELS:
        if not label(command, name, key):
            raise ImageError(f"{image} has no label org.opencontainers.image.{key}")
    size = mebibytes(command, name)
    if size > _MOST_MIB[image]:
        raise ImageError(f"{image} is {size} MiB, more than the {_MOST_MIB[image]} allowed")
    print(
        f"{image}: {size} MiB, user {user}, read-only, no network, no capabilities: "
        f"{len(_COMMANDS[image])} commands and a stop",
        flush=True,
    )


def _check_signals(strict: list[str], image: str, name: str) -> None:
    command = strict[0]
    # as Kubeflow starts a step: behind a shell
    sleep = 'echo ready; sh -c "sleep 600; exit 1"'
    started = [part for part in strict if part != "--rm"]
    container = output([*started[:2], "--detach", *started[2:], name, "sh", "-c", sleep], "start")
    try:
        # before the init runs nobody takes signals
        while not output([command, "logs", container], "logs"):
            time.sleep(0.1)
        begun = time.monotonic()
        output([command, "stop", "--time", str(_STOP_SECONDS), container], "stop")
        seconds = time.monotonic() - begun
        code = output([command, "inspect", "--format", "{{.State.ExitCode}}", container], "inspect")
        if code != "143" or seconds >= _STOP_SECONDS:
            raise ImageError(f"{image}: SIGTERM ended it after {seconds:.0f} s with code {code}")
    finally:
        output([command, "rm", "--force", container], "rm")


def main(arguments: list[str] | None = None) -> int:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image", action="append", choices=IMAGES, help="only this one")
    options = parser.parse_args(arguments)
    try:
        command, names = engine(), read_names()
        for image in options.image or IMAGES:
            if image not in names:
                raise ImageError(f"the {image} image was not built: run `make images`")
            check(command, image, names[image])
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
