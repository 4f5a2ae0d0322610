"""The command line: ``dpo <stage> [key=value ...]``.

Nothing heavy is imported until a stage runs, so ``--help`` and a typo answer at once.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo import handlers
from dpo.commands import ABOUT_PUBLISHED, COMMANDS, PATHS
from dpo.config.arguments import Arguments
from dpo.errors import ConfigError, DpoError, print_any_text, system_problem
from dpo.storage.processes import told_to_end

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    print_any_text()
    # else Python looks for cycles in all that torch and transformers defined once more before it
    # ends: 2 s of processor time after a command's last line
    atexit.register(gc.freeze)
    try:
        with told_to_end():
            return _main(given)
    except DpoError as error:
        print(f"dpo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndpo: stopped; nothing half-written was kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"dpo: {system_problem(error)}", file=sys.stderr)
        return 1


def _main(given: list[str]) -> int:
    if given[:1] == ["help"] and given[1:2] and given[1] in COMMANDS:
        given = [given[1], "--help"]
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name == "--version":
        from dpo import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"there is no command {name!r}{hint}", fix=f"choose one of {', '.join(COMMANDS)}"
        )
    _refuse_copies(name)
    parser = _options(name)
    options, overrides = parser.parse_known_args(rest)
    if stray := [text for text in overrides if text.startswith("-")]:
        parser.error(f"unknown option {stray[0]}")
    return _run(name, options, overrides)


def _refuse_copies(name: str) -> None:
    """Started by torchrun each process would do all of the work, and write to one place."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"dpo {name} was started {os.environ['WORLD_SIZE']} times, by torchrun",
            fix="start it once, without torchrun: with trainer=FSDPTrainer it starts a process for "
            "each device itself (DPO_PROCESSES sets another number)",
        )


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpo COMMAND [key=value ...] [--config-dir DIR]",
            "",
            "Preference fine-tuning: SFT, then DPO, conservative DPO or IPO.",
            "",
            *lines,
            "",
            "`dpo COMMAND --help` explains one; `dpo config` prints all settings.",
        ]
    )


def _options(name: str) -> Arguments:
    command = COMMANDS[name]
    lines = [f"example:\n  {command.example}"]
    if command.paths:
        what = {**PATHS, **command.own_paths}
        shown = [
            f"  {path}=  {what[path]}{'' if path in command.required else ' (optional)'}"
            for path in command.paths
        ]
        lines.append("paths:\n" + "\n".join(shown))
    own = name in ABOUT_PUBLISHED
    if command.keys:
        more = "" if own else "\n`dpo config` prints all of them."
        lines.append(f"{'' if own else 'often used '}settings:\n  {command.keys}{more}")
    parser = Arguments(
        prog=f"dpo {name}",
        usage=f"dpo {name} {command.takes}",
        description=command.summary,
        epilog="\n\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if "--config-dir" in command.takes:
        text = "folder with choices of your own, such as model/mine.yaml"
        parser.add_argument("--config-dir", type=Path, help=text)
    for option in command.options:
        parser.add_argument(option.flag, **option.how)
    return parser


def _path(key: str, value: str) -> Path:
    if not value:
        # a variable of the shell that is not set; the folder that one is in is not meant
        raise ConfigError(f"{key}= names no place", fix=f"write {key}=PATH ({PATHS[key]})")
    return Path(value).expanduser()


def _run(name: str, options: argparse.Namespace, overrides: list[str]) -> int:
    command = COMMANDS[name]
    if name in ABOUT_PUBLISHED or (name == "publish" and options.rollback):
        from dpo.publish.command import run

        which = "publish --rollback" if name == "publish" else name
        form = ["format=json"] if getattr(options, "output", "") == "json" else []
        return run(which, [*overrides, *form], command.example)
    if name == "compare":
        from dpo.evaluate.compare import run_compare

        return run_compare(overrides)
    if name == "ingest" and options.check:
        return handlers.check(options, overrides)
    paths = {}
    settings = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if key in command.paths and separator:
            paths[key] = _path(key, value)
        elif key == "registry" and name == "publish":
            settings.append(f"publish.{text}")
        elif key in PATHS and separator:
            raise ConfigError(
                f"dpo {name} takes no {key}=",
                fix=f"it takes {', '.join(f'{path}=' for path in command.paths) or 'no paths'}",
            )
        else:
            settings.append(text)
    missing = [path for path in command.required if path not in paths]
    if missing:
        needed = ", ".join(f"{path}= ({PATHS[path]})" for path in missing)
        raise ConfigError(f"dpo {name} needs {needed}", fix=command.example)
    if name == "plan":
        return handlers.plan(settings, paths, options)
    return handlers.RUNNERS[name](handlers.composed_of(settings, options), paths, options)
