"""What a person sees while a run goes on here."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from dpo.storage.progress import time_left
from pipelines.display import Display, RunView, render
from pipelines.outcome import Outcome, show

STEPS = ("fingerprint", "sft", "preference", "finish")


def event(kind: str, step: str, at: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "time": at, **more}


def counted(step: str, at: float, done: int, total: int | None, note: str = "") -> dict[str, Any]:
    return event("progress", step, at, unit="steps", done=done, total=total, note=note)


def view_after(*events: dict[str, Any]) -> RunView:
    view = RunView.of(STEPS)
    for one in events:
        view.apply(one)
    return view


def states(view: RunView) -> list[str]:
    return [step.state for step in view.steps.values()]


@pytest.mark.parametrize(
    ("seconds", "counted", "done", "total", "shown"),
    [
        # 30 steps in 60 s, 10 before them: 2 s a step, 160 steps are left
        (60.0, 30, 40, 200, "0:05:20 left"),
        # 1 of 3 in 2 h: 4 h are left
        (7200.0, 1, 1, 3, "4:00:00 left"),
        (60.0, 0, 10, 200, ""),
        (60.0, 30, 200, 200, ""),
        (60.0, 30, 30, None, ""),
    ],
)
def test_time_left(seconds: float, counted: int, done: int, total: int | None, shown: str) -> None:
    assert time_left(seconds, counted, done, total) == shown


def test_loading_a_model_and_an_earlier_attempt_are_not_part_of_the_pace() -> None:
    view = view_after(
        event("start", "sft", 0.0),
        counted("sft", 100.0, 50, 60),
        counted("sft", 104.0, 52, 60),
    )
    # 2 steps in 4 s, 8 are left
    assert view.steps["sft"].left == "0:00:16 left"


def test_a_second_loop_of_a_step_has_a_pace_of_its_own() -> None:
    view = view_after(
        event("start", "sft", 0.0),
        counted("sft", 1.0, 0, 10),
        counted("sft", 2.0, 10, 10),
        counted("sft", 50.0, 0, 4),
        counted("sft", 60.0, 1, 4),
    )
    assert view.steps["sft"].left == "0:00:30 left"


def test_a_log_has_whole_lines() -> None:
    note = "loss 0.6973  accuracy 0.125  margin -0.008157  pairs_per_second 3.676 " * 2
    file = io.StringIO()
    view = view_after(
        event("message", "preference", text="a word " * 30),
        event("start", "preference"),
        counted("preference", 2.0, 0, 12),
        counted("preference", 3.0, 3, 12, note.strip()),
    )
    Display(view, Console(file=file, width=80)).update()
    said, _, _, line = file.getvalue().splitlines()
    assert said.rstrip() == "preference: " + " ".join(["a word"] * 30)
    assert line.startswith("preference   running")
    assert line.endswith(f"3/12 steps  0:00:03 left  {note.strip()}")


def test_states_of_a_run_that_fails() -> None:
    running = view_after(
        event("start", "sft"), event("error", "sft", 9.0, text="no memory", exit_code=1)
    )
    assert states(running) == ["cached", "failed", "waiting", "waiting"]
    assert running.error is not None
    assert running.error["text"] == "no memory"
    running.apply(event("start", "finish"))
    assert states(running) == ["cached", "failed", "skipped", "running"]
    running.apply(event("end", "finish"))
    running.finish()
    assert states(running) == ["cached", "failed", "skipped", "done"]


def test_a_step_that_was_killed_has_failed_when_the_run_is_over() -> None:
    view = view_after(event("start", "sft"))
    view.finish()
    assert states(view) == ["cached", "failed", "skipped", "skipped"]


def test_the_table_on_a_terminal_shows_every_step() -> None:
    view = view_after(
        event("start", "sft"),
        counted("sft", 2.0, 0, 4),
        counted("sft", 3.0, 1, 4, "loss [0.5]"),
        event("progress", "unknown", unit="", done=0, total=None, note=""),
    )
    file = io.StringIO()
    Console(file=file, width=100, force_terminal=True, color_system=None).print(render(view))
    shown = file.getvalue()
    assert all(name in shown for name in STEPS)
    assert "1/4 steps  0:00:03 left  loss [0.5]" in shown


def test_lines_of_the_summary_are_whole_where_they_are_piped():
    """Whoever searches them finds what stands beside each other."""
    explanation = "reward accuracy 0.61 is at least 0.55, which is the limit of this community"
    rule = {"explanation": explanation, "passed": True}
    published = {"name": "policy", "content_hash": "ab" * 32, "unchanged": True}
    verdict = {"approved": True, "rules": [rule]}
    said = io.StringIO()
    outcome = Outcome("succeeded", "r1", verdict=verdict, published=published)
    show(outcome, Console(file=said, width=40))
    assert f"  ✓ {explanation}" in said.getvalue().splitlines()
    moved = "Published: policy abababababab (this content was published before: no bytes moved)"
    assert moved in said.getvalue().splitlines()
