"""A copy of the sources in which tests may change a line, with runs of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PARTS = ("dpo", "components", "pipelines", "config", "images")
# one optimiser step in each training stage: the tests ask what ran, not what was learnt
FAST = (
    *("model=tiny", "max_length=96", "max_prompt_length=48", "test_fraction=0.3"),
    *("sft.n_examples=16", "preference.n_examples=16", "evaluate_n_pairs=16"),
    *("evaluation.n_samples=1", "evaluation.max_new_tokens=4", "evaluation.n_bootstrap=100"),
    "gate.min_reward_accuracy=0",
)


@dataclass
class Checkout:
    """The sources in ``folder``, their data in ``folder/pairs.jsonl``, runs in ``folder/runs``."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Checkout:
        """A fresh copy, with the 64 golden pairs as its data."""
        for part in _PARTS:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / part, ignore=ignore, symlinks=True)
        shutil.copyfile(ROOT / "tests/golden/pairs.jsonl", folder / "pairs.jsonl")
        return cls(folder)

    @property
    def data(self) -> Path:
        """The pairs that its runs train on."""
        return self.folder / "pairs.jsonl"

    def command(self, *arguments: str, fast: bool = True) -> list[str]:
        """``python pipelines/submit.py --local`` with ``arguments``."""
        settings = (*FAST, f"datasets=[{self.data}]") if fast else ()
        assignments = [item for setting in settings for item in ("--set", setting)]
        program = [sys.executable, str(self.folder / "pipelines/submit.py"), "--local"]
        return [*program, "--runs-dir", str(self.folder / "runs"), *assignments, *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        """The sources of the copy come before the installed ones."""
        return {**os.environ, "PYTHONPATH": str(self.folder), **variables}

    def run(
        self, *arguments: str, fast: bool = True, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the pipeline and wait."""
        return subprocess.run(
            self.command(*arguments, fast=fast),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env=self.environment(**(environment or {})),
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run the pipeline and do not wait."""
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """Of its runs: each has the folder in its command line."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(self.folder) in (process / "cmdline").read_text():
                    found.append(int(process.name))
            except OSError:
                continue
        return found

    def outcome(self, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """Run with ``--output json``; the object that it printed."""
        done = self.run(*arguments, "--output", "json", environment=environment)
        assert done.stdout, done.stderr
        outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert outcome["exit_code"] == done.returncode
        return outcome

    def edit(self, path: str, old: str, new: str) -> None:
        """Change one place of a source file."""
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, (path, old)
        file.write_text(text.replace(old, new), encoding="utf-8")
