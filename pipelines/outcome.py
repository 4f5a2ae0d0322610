"""How a run ended, in the words and exit codes that CI relies on, and what to show of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo.errors import DpoError, system_problem
from dpo.storage.manifest import read_manifest

State = Literal["succeeded", "failed", "refused", "cancelled", "timed out", "unknown", "submitted"]

EXIT_CODES: dict[State, int] = {
    "succeeded": 0,
    "submitted": 0,
    "failed": 1,
    "refused": 3,
    "cancelled": 4,
    "timed out": 5,
    "unknown": 5,
}
"""2 is what started nothing: a mistake in the command or its configuration, as everywhere in this
project, or something that is not there. 5 is what may go on: the time was over, or the endpoint or
the store could not be asked any more."""
NOTHING_STARTED = 2


@contextmanager
def nothing_started() -> Iterator[None]:
    """What is wrong in here ends with 2, whatever it is: inside a step, data that is missing fails
    the run; before the first step it lets none begin."""
    try:
        yield
    except OSError as problem:
        error = system_problem(problem)
        error.exit_code = NOTHING_STARTED
        raise error from None
    except DpoError as error:
        error.exit_code = NOTHING_STARTED
        raise


@dataclass
class Outcome:
    """The end of a run."""

    state: State
    run_id: str
    where: str = ""
    """Link to the run in the UI, or its folder."""
    message: str = ""
    """Why it failed, or why nothing more is known of it."""
    steps: dict[str, str] = field(default_factory=dict)
    """done, cached, failed or skipped."""
    seconds: dict[str, float] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    """Last figures of sft and preference."""
    places: dict[str, str] = field(default_factory=dict)
    """Report, checkpoints, published model."""

    @property
    def exit_code(self) -> int:
        """See ``EXIT_CODES``."""
        return EXIT_CODES[self.state]

    def as_json(self) -> str:
        """One object on one line."""
        return json.dumps({**asdict(self), "exit_code": self.exit_code}, sort_keys=True)


def read_outputs(outcome: Outcome, artifacts: dict[str, Path]) -> None:
    """Fill an outcome from the step outputs of a local run."""
    if folder := artifacts.get("gate"):
        outcome.verdict = _json(folder / "verdict.json")
        outcome.state = "succeeded" if outcome.verdict["approved"] else "refused"
        if outcome.verdict["approved"] and "publish" not in artifacts:
            outcome.state = "failed"
            outcome.message = "the gate approved the policy, but publish did not run"
    if folder := artifacts.get("evaluate"):
        outcome.evaluation = _json(folder / "evaluation.json")
        # the gate's copy has the verdict on top
        copy = artifacts["gate"] / "report.html" if "gate" in artifacts else None
        shown = copy if copy and copy.is_file() else folder / "report.html"
        outcome.places["report"] = str(shown)
    if folder := artifacts.get("publish"):
        outcome.published = _json(folder / "published.json")
        outcome.places["published model"] = outcome.published["url"]
    for step, name in (
        ("ingest", "data report"),
        ("sft", "SFT checkpoint"),
        ("preference", "policy checkpoint"),
    ):
        if folder := artifacts.get(step):
            report = folder / "report.html"
            outcome.places[name] = str(report if step == "ingest" and report.is_file() else folder)
            if step != "ingest":
                outcome.training[step] = read_manifest(folder, stage=step, verify=False).details


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def show(outcome: Outcome, console: Console, *, next_command: str = "") -> None:
    """The summary at the end of a run."""
    console.print()
    if outcome.evaluation:
        _show_evaluation(outcome, console)
    if outcome.verdict:
        _show_verdict(outcome.verdict, console)
    if outcome.published:
        _show_published(outcome.published, console)
    if outcome.places:
        _show_places(outcome.places, console)
    if outcome.message or outcome.state == "cancelled":
        console.print(f"[red]{outcome.state}[/red]", highlight=False)
    if outcome.message:
        console.print(outcome.message, markup=False, highlight=False, soft_wrap=True)
    if next_command:
        console.print(
            f"\nNext: [bold]{escape(next_command)}[/bold]", highlight=False, soft_wrap=True
        )


def _show_evaluation(outcome: Outcome, console: Console) -> None:
    evaluation = outcome.evaluation
    console.print(f"Held out: {evaluation['n_pairs']} pairs", highlight=False)
    table = Table(box=None)
    table.add_column("")
    table.add_column("before (SFT)", justify="right")
    table.add_column("after (policy)", justify="right")
    table.add_column("chance", justify="right")
    chance = f"{evaluation['chance']:.2f}"
    before, after = evaluation["before"], evaluation["after"]
    rows = (
        ("reward accuracy", "reward_accuracy", chance),
        ("log-prob accuracy (sum)", "accuracy_sum", chance),
        ("log-prob accuracy (mean)", "accuracy_per_token", chance),
        ("reward margin", "reward_margin", ""),
        ("preference loss", "loss", ""),
    )
    for label, key, shown_chance in rows:
        table.add_row(label, _interval(before.get(key)), _interval(after.get(key)), shown_chance)
    console.print(table)
    for step, name in (("sft", "SFT"), ("preference", "Preference")):
        if line := _training_line(outcome.training.get(step, {})):
            console.print(f"{name}: {line}", highlight=False, soft_wrap=True)


def _training_line(details: dict[str, Any]) -> str:
    if details.get("steps") == 0:
        return "left out"
    parts = []
    for key, label in (("examples", "examples"), ("steps", "steps")):
        if key in details:
            parts.append(f"{details[key]:,} {label}")
    # of SFT the loss per token: the loss itself is a sum, which follows the lengths of a batch
    for label, name in (("loss per token", "nll_per_token"), ("loss", "train_loss")):
        first, last = details.get(f"first_{name}"), details.get(f"last_{name}")
        if isinstance(first, float) and isinstance(last, float):
            parts.append(f"training {label} {first:.3f} → {last:.3f}")
            break
    return ", ".join(parts)


def _interval(figure: dict[str, float] | None) -> str:
    if not figure:
        return "–"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _show_verdict(verdict: dict[str, Any], console: Console) -> None:
    word = "[green]approved[/green]" if verdict["approved"] else "[yellow]refused[/yellow]"
    forced = " (forced)" if verdict.get("forced") else ""
    forced = " (unchanged: published already)" if verdict.get("unchanged") else forced
    console.print(f"\nGate: {word}{forced}", highlight=False)
    for rule in verdict["rules"]:
        mark = "✓" if rule["passed"] else "✗"
        console.print(
            f"  {mark} {rule['explanation']}", markup=False, highlight=False, soft_wrap=True
        )


def _show_published(published: dict[str, Any], console: Console) -> None:
    if published["unchanged"]:
        moved = "this content was published before: no bytes moved"
    else:
        moved = f"{published['files']} files, {published['bytes_moved'] / 2**20:,.1f} MiB"
    console.print(
        f"Published: {published['name']} {published['content_hash'][:12]} ({moved})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _show_places(places: dict[str, str], console: Console) -> None:
    console.print()
    for name, place in places.items():
        console.print(f"{name:18} {place}", markup=False, highlight=False, soft_wrap=True)
