"""Progress of a step: events in a file that another process draws, a bar, or plain log lines.

A step does not know who looks: with ``DPO_PROGRESS_FILE`` set it appends JSON lines there (the
pipeline's parent draws the bars), on a terminal it draws its own bar, else it prints a line every
ten seconds (a pod's log).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from dpo.errors import DpoError, masked, printable, system_problem
from dpo.storage.notebook import NotebookBar, in_notebook
from dpo.storage.processes import END_WITH, end_with

FILE_VARIABLE = "DPO_PROGRESS_FILE"
_LOG_INTERVAL_SECONDS = 10.0
_EVENT_INTERVAL_SECONDS = 0.1

Event = Literal["start", "progress", "message", "end", "error"]


def emit(event: Event, step: str, **values: Any) -> None:
    """Append one event for whoever draws; nothing happens when nobody asked for events."""
    path = os.environ.get(FILE_VARIABLE)
    if not path:
        return
    line = json.dumps({"event": event, "step": step, "time": time.time(), **values}) + "\n"
    # O_APPEND and one write: lines of several processes do not mix. An event that does not fit on
    # the disk is no reason to fail: whatever matters fails by itself.
    with suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete events from byte ``offset`` on, and the offset to read from next time."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    complete = data[: data.rfind(b"\n") + 1]
    return [*_parsed(complete.splitlines())], offset + len(complete)


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        # a full disk cuts a line short, and the next one is appended to it
        with suppress(ValueError):
            yield json.loads(line)


def message(step: str, text: str) -> None:
    """One line that a person should see now, without passwords and terminal escapes."""
    text = printable(masked(text))
    emit("message", step, text=text)
    if not os.environ.get(FILE_VARIABLE):
        print(text, file=sys.stderr, flush=True)


class Bar:
    """Progress of one long loop. Use as a context manager; see ``track``."""

    def __init__(self, step: str, unit: str, total: int | None, done: int = 0) -> None:
        self.step, self.unit, self.total = step, unit, total
        self.done = self._before = done
        self._told = 0
        self.shortest_seconds = 0.0
        """Least time between two lines; where they go may ask for more."""
        self._shown = 0.0
        self._events = bool(os.environ.get(FILE_VARIABLE))
        self._rich: Progress | None = None
        self._task: TaskID | None = None
        self._notebook: NotebookBar | None = None
        self._began = time.monotonic()
        if not self._events and in_notebook():
            self._notebook = NotebookBar(step, unit, total)
        elif not self._events and sys.stderr.isatty():
            from rich.console import Console

            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]} {task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Bar:
        if self._rich is not None:
            self._rich.start()
            self._task = self._rich.add_task(self.step, total=self.total, unit=self.unit, note="")
        self._show(force=True, values={})
        return self

    def __exit__(self, *_: object) -> None:
        self._show(force=True, values={})
        if self._rich is not None:
            self._rich.stop()

    def advance(self, amount: int = 1, **values: float) -> None:
        """``amount`` more units are done; ``values`` are figures to show beside the bar."""
        self.done += amount
        self._show(force=False, values=values)

    def _show(self, *, force: bool, values: dict[str, float]) -> None:
        drawn = self._events or self._rich or self._notebook
        usual = _EVENT_INTERVAL_SECONDS if drawn else _LOG_INTERVAL_SECONDS
        interval = max(usual, self.shortest_seconds)
        now = time.monotonic()
        if not force and now - self._shown < interval and self.done != self.total:
            return
        self._shown = now
        note = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._events:
            emit(
                "progress",
                self.step,
                unit=self.unit,
                done=self.done,
                total=self.total,
                note=note,
            )
        elif self._notebook is not None:
            self._notebook.show(self.done, f"{note}  {self._left()}".strip())
        elif self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=self.done)
            if note:
                self._rich.update(self._task, note=note)
        elif self.done != self._told:
            self._told = self.done
            of = f"/{self.total}" if self.total else ""
            text = f"{self.step}: {self.done}{of} {self.unit}  {note}  {self._left()}"
            print(text.rstrip(), file=sys.stderr)

    def _left(self) -> str:
        """Time to the end at the pace so far."""
        seconds = time.monotonic() - self._began
        return time_left(seconds, self.done - self._before, self.done, self.total)


def track(step: str, unit: str, total: int | None, done: int = 0) -> Bar:
    """A progress bar for ``total`` units (rows, steps, samples, bytes) of ``step``.

    ``done`` of them were done before, by an attempt that was ended.
    """
    return Bar(step, unit, total, done)


def time_left(seconds: float, counted: int, done: int, total: int | None) -> str:
    """As h:mm:ss, where ``counted`` of the ``done`` units took ``seconds``; "" if not known."""
    if not total or counted < 1 or done >= total:
        return ""
    minutes, rest = divmod(round(seconds / counted * (total - done)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left"


@contextmanager
def reported(step: str) -> Iterator[None]:
    """Run a step: a DpoError becomes its one message and an exit code, not a traceback.

    Every other exception is a bug of ours and keeps its traceback; its last line is reported too.
    """
    if runner := os.environ.get(END_WITH):
        end_with(int(runner))
    emit("start", step)
    try:
        yield
    except DpoError as error:
        emit("error", step, text=str(error), exit_code=error.exit_code)
        print(f"{step}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        problem = system_problem(error)
        emit("error", step, text=str(problem), exit_code=1)
        print(f"{step}: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except BaseException as error:
        emit("error", step, text=f"{type(error).__name__}: {error}", exit_code=1, bug=True)
        raise
    emit("end", step)
