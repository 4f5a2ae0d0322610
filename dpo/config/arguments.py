"""A command line whose mistakes are one line, not the whole usage."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from dpo.errors import ConfigError

_UNKNOWN = ("unrecognized arguments: ", "unknown option ")


class Arguments(argparse.ArgumentParser):
    """argparse, but that a mistake is raised for the command to print."""

    def error(self, message: str) -> NoReturn:
        """Always raises.

        Raises:
            ConfigError: what is wrong, and the command that explains all options.
        """
        for start in _UNKNOWN:
            if message.startswith(start):
                word = message.removeprefix(start).split()[0].partition("=")[0]
                near = difflib.get_close_matches(word, self._option_string_actions, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                message = f"unknown option {word}{hint}"
                if not word.startswith("-"):
                    message = f"{word!r} is no option"
        raise ConfigError(f"{message}; see `{self.prog} --help`")
