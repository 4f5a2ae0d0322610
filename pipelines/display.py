"""Draws a run on the terminal: one line a step, one bar for each long loop inside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo.storage.progress import time_left

State = Literal["waiting", "running", "done", "cached", "failed", "skipped"]

_MARKS: dict[State, tuple[str, str]] = {
    "waiting": ("·", "dim"),
    "running": ("▸", "cyan"),
    "done": ("✓", "green"),
    "cached": ("=", "blue"),
    "failed": ("✗", "red"),
    "skipped": ("–", "yellow"),
}
_LOG_INTERVAL_SECONDS = 15.0
LAST = "finish"
"""The step that ends every run, however it went."""


@dataclass
class StepView:
    """What is known of one step."""

    name: str
    state: State = "waiting"
    unit: str = ""
    done: int = 0
    total: int | None = None
    note: str = ""
    started: float = 0.0
    ended: float = 0.0
    counted: tuple[float, int] = (0.0, 0)
    """When units were first counted, and how many: before that a step loads its model."""
    told: float = 0.0
    """When units were last counted."""

    @property
    def seconds(self) -> float:
        """Time since the step began, or the time it took."""
        return (self.ended or time.time()) - self.started if self.started else 0.0

    @property
    def left(self) -> str:
        """Time to the end of the loop at its pace so far."""
        since, before = self.counted
        return time_left(self.told - since, self.done - before, self.done, self.total)

    def settle(self) -> None:
        """Nothing more will come: what did not end has failed, what did not begin was not run."""
        if self.state == "running":
            self.state, self.ended = "failed", time.time()
        elif self.state == "waiting":
            self.state = "skipped"

    def count(self, event: dict[str, Any]) -> None:
        """Take one event with a number of units; another loop of the step counts anew."""
        done, unit = event["done"], event["unit"]
        if not self.counted[0] or unit != self.unit or done < self.done:
            self.counted = event["time"], done
        self.unit, self.done, self.total, self.told = unit, done, event["total"], event["time"]
        self.note = event["note"] or self.note


@dataclass
class RunView:
    """State of a run, kept up to date from progress events."""

    steps: dict[str, StepView]
    messages: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None

    @classmethod
    def of(cls, names: tuple[str, ...]) -> RunView:
        """All steps waiting."""
        return cls({name: StepView(name) for name in names})

    @property
    def states(self) -> dict[str, str]:
        """State of each step."""
        return {name: step.state for name, step in self.steps.items()}

    def apply(self, event: dict[str, Any]) -> None:
        """Take one progress event into account; those of unknown steps are ignored."""
        view = self.steps.get(event["step"])
        if view is None:
            return
        match event["event"]:
            case "start":
                self._start(view, event["time"])
            case "progress":
                view.count(event)
            case "message":
                self.messages.append(f"{view.name}: {event['text']}")
            case "end":
                view.state, view.ended = "done", event["time"]
            case "error":
                view.state, view.ended = "failed", event["time"]
                self.error = event

    def _start(self, view: StepView, now: float) -> None:
        view.state, view.started, view.ended, view.counted = "running", now, 0.0, (0.0, 0)
        if view.name == LAST:
            # it comes after a failure and after a refusal as well
            self._settle_before_the_end()
            return
        # steps run one after the other: one that never began was served from the cache
        for earlier in self.steps.values():
            if earlier is view:
                break
            if earlier.state == "waiting":
                earlier.state = "cached"

    def _settle_before_the_end(self) -> None:
        for view in self.steps.values():
            if view.name != LAST:
                view.settle()

    def finish(self) -> None:
        """Settle the states of steps that sent nothing, when the run is over."""
        for view in self.steps.values():
            view.settle()


def render(view: RunView) -> Group:
    """The table of steps."""
    table = Table.grid(padding=(0, 1))
    table.add_column(width=2)
    table.add_column(width=12)
    table.add_column(width=24)
    table.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    for step in view.steps.values():
        mark, style = _MARKS[step.state]
        table.add_row(Text(mark, style), Text(step.name, style), _bar(step), _detail(step))
    return Group(table)


def _bar(step: StepView) -> ProgressBar | Text:
    if step.state == "running" and step.total:
        return ProgressBar(total=step.total, completed=step.done, width=24)
    return Text({"cached": "cached", "skipped": "not run"}.get(step.state, ""), "dim")


def _detail(step: StepView) -> Text:
    if not step.started:
        return Text("")
    of = f"/{step.total:,}" if step.total else ""
    count = f"{step.done:,}{of} {step.unit}" if step.unit else ""
    parts = [f"{step.seconds:.0f} s", count]
    if step.state == "running":
        parts += [step.left, step.note]
    return Text("  ".join(part for part in parts if part), "dim" if step.ended else "")


class Display:
    """A live table on a terminal; plain lines where there is none (a CI log)."""

    def __init__(self, view: RunView, console: Console) -> None:
        self.view = view
        self.console = console
        self._live: Live | None = None
        self._printed: dict[str, tuple[State, float]] = {}
        self._messages = 0

    @contextmanager
    def shown(self) -> Iterator[Display]:
        """Draw while the block runs."""
        if not self.console.is_terminal:
            yield self
            self.update()
            return
        with Live(
            console=self.console, get_renderable=lambda: render(self.view), refresh_per_second=5
        ) as self._live:
            yield self

    def update(self) -> None:
        """Show what changed."""
        for text in self.view.messages[self._messages :]:
            self._say(escape(text), style="dim")
        self._messages = len(self.view.messages)
        if self._live is None:
            self._print_lines()

    def _print_lines(self) -> None:
        now = time.monotonic()
        for step in self.view.steps.values():
            state, printed = self._printed.get(step.name, ("waiting", now))
            due = step.state == "running" and now - printed > _LOG_INTERVAL_SECONDS
            if step.state == state and not due:
                continue
            self._printed[step.name] = (step.state, now)
            detail = _detail(step).plain
            self._say(f"{step.name:12} {step.state:8} {escape(detail)}".rstrip())

    def _say(self, text: str, style: str = "") -> None:
        # a log has lines of any length: one that is broken at 80 columns is hard to search
        whole = not self.console.is_terminal
        self.console.print(text, highlight=False, style=style, soft_wrap=whole)
