"""What the options of ``submit.py`` may be together: nothing that is asked for is passed over; and
what is asked for without a run."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo.errors import ConfigError, RequestError
from pipelines.package import defaults, help_texts, save_package

_ENDPOINT_ONLY = (
    *("nodes", "endpoint", "namespace", "experiment", "run_name", "cancel_on_interrupt"),
    *("upload", "run", "schedule", "retry", "cancel"),
)
_IMAGES_ONLY = ("deployment", "deploy", "images", "image")
_MEANINGLESS_WITH = {
    "list": ("cancel", "retry", "schedule", "upload", "run", "dry_run"),
    "cancel": ("retry", "schedule", "start_from", "dry_run", "upload", "run", "rerun", "wait"),
    "retry": ("schedule", "start_from", "dry_run", "upload", "run", "rerun", "sweep"),
    "schedule": ("wait", "run", "cancel_on_interrupt"),
}
_OF_A_RUN = ("assignments", "preset", "run_name", "experiment")
_OF_A_PACKAGE = ("store", *_IMAGES_ONLY, "nodes")
_PROGRAM = Path(__file__).with_name("submit.py")
_BETA = ("loss.beta=", "preference.loss.beta=", "preference_beta=")
_NEEDS_WAIT = ("timeout_seconds", "cancel_on_interrupt")


def not_empty(text: str) -> str:
    """An option's value: an empty one is a variable that was not set, and would start a new run."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; is a variable not set?")
    return text


def place(text: str) -> Path:
    """A file or folder; an empty one would be the folder in which the command is started."""
    return Path(not_empty(text))


def steps(text: str) -> list[str]:
    """Names of steps between commas; none at all would be a run without what was asked for."""
    named = [step for word in text.split(",") if (step := word.strip())]
    if not named:
        raise argparse.ArgumentTypeError("no step is named; is a variable not set?")
    return named


def seconds(text: str) -> float:
    """A time limit: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def check(options: argparse.Namespace) -> None:
    """Refuse what would be passed over in silence.

    Raises:
        ConfigError: an option that means nothing where the run is to be, or beside another one.
    """
    if options.local and (name := _first(options, _ENDPOINT_ONLY)):
        raise ConfigError(
            f"{name} is for Kubeflow, and --local runs on this machine",
            fix="leave out one of the two",
        )
    if options.local == "processes" and (name := _first(options, _IMAGES_ONLY)):
        raise ConfigError(
            f"{name} is for images, and --local runs in processes",
            fix="leave out one of the two, or pass --local docker",
        )
    for action, others in _MEANINGLESS_WITH.items():
        if (first := _first(options, (action,))) and (name := _first(options, others)):
            raise ConfigError(
                f"{first} and {name} cannot be followed together", fix="leave out one of the two"
            )
    if not (options.wait or options.local) and (name := _first(options, _NEEDS_WAIT)):
        raise ConfigError(f"{name} is for a run that is waited for", fix="add --wait")
    if options.package and not options.dry_run:
        raise ConfigError(
            "--package is written with --dry-run alone",
            fix="add --dry-run; `python -m pipelines.package --output FILE` writes one to upload",
        )


def passed_over(options: argparse.Namespace) -> str:
    """What to say of options that are of a run of its own, beside an action that starts none.

    They are no mistake to end with: whoever sends several commands gives all of them the same.
    """
    shards = ("ingest_shards",) if options.ingest_shards != 1 else ()
    if options.retry and (names := _given(options, (*_OF_A_RUN, *_OF_A_PACKAGE, *shards))):
        return (
            f"run {options.retry} goes on as it was sent, without {', '.join(names)}. With new "
            "settings it is sent anew: finished steps come from the cache, and a training goes on "
            "from its last checkpoint"
        )
    starts = options.run or options.wait or options.schedule
    if options.upload and not starts and (names := _given(options, (*_OF_A_RUN, "start_from"))):
        return (
            f"registered without {', '.join(names)}: values are given with each run (--run, "
            "--schedule)"
        )
    return ""


def _first(options: argparse.Namespace, names: Iterable[str]) -> str:
    """The first of these options that was given, as it is written; else nothing."""
    return next(iter(_given(options, names)), "")


def _given(options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Those of these options that were given, as they are written."""
    written = {"start_from": "--from", "assignments": "--set"}
    return [
        written.get(name, f"--{name.replace('_', '-')}")
        for name in names
        if (value := getattr(options, name)) is not None
        and value is not False
        and value not in ("", [])
    ]


def next_command(options: argparse.Namespace, state: str, beta: float | None) -> str:
    """The same run on more data; where there is no more, or the gate refused, another beta than
    the run had.

    Nothing after a sweep, steps run again, a reading in shards or images: it would be another run.
    """
    if not options.local or state not in ("succeeded", "refused"):
        return ""
    if _first(options, ("sweep", "rerun", *_IMAGES_ONLY)) or options.ingest_shards > 1:
        return ""
    larger = {"toy": "quick", "full": None}.get(options.preset, "full")
    again = state == "refused" or options.start_from or larger is None
    preset = options.preset if again else larger
    kept = {
        "--local": options.local if options.local != "processes" else "",
        "--preset": preset,
        "--from": options.start_from,
        "--store": options.store,
        "--runs-dir": options.runs_dir and str(options.runs_dir),
    }
    words = [word for option, value in kept.items() if value for word in (option, value)]
    assignments = [*options.assignments]
    if again:
        assignments = [text for text in assignments if not text.startswith(_BETA)]
        assignments.append("loss.beta=0.4" if beta == 0.2 else "loss.beta=0.2")
    words += [word for text in assignments for word in ("--set", text)]
    if again:
        words.append("--dry-run")
    elif words == ["--preset", preset] and Path("Makefile").is_file():
        return "make run" if preset == "quick" else f"make run PRESET={preset}"
    local = [] if kept["--local"] else ["--local"]
    return shlex.join([_from_here(sys.executable), _from_here(_PROGRAM), *local, *words])


def _from_here(path: str | Path) -> str:
    """As it is written in this folder."""
    place = Path(path).absolute()
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


def write_package(documents: list[dict[str, Any]], target: Path) -> None:
    """What ``--dry-run`` leaves.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_package(documents, target)
    except OSError as error:
        raise RequestError(
            f"the package cannot be written: {error.strerror}",
            where=str(target),
            fix="name another file with --package, or another folder with --runs-dir",
        ) from None


def list_parameters(documents: list[dict[str, Any]], *, as_json: bool) -> int:
    """Print what ``--list`` asks for; returns the exit code."""
    table = Table(box=None)
    for heading in ("parameter", "default", "meaning"):
        table.add_column(heading, overflow="fold")
    texts = help_texts(documents)
    given = defaults(documents)
    if as_json:
        told = {n: {"default": d, "meaning": " ".join(texts[n].split())} for n, d in given.items()}
        print(json.dumps({"parameters": told}))
        return 0
    # the sources' order groups them by stage; the compiled form is sorted by name
    from dpo.config.parameters import OVERRIDES, PARAMETERS, STARTS

    for name in [*PARAMETERS, *OVERRIDES, *STARTS]:
        row = (name, json.dumps(given[name]), " ".join(texts[name].split()))
        table.add_row(*map(escape, row))
    Console().print(table)
    return 0
