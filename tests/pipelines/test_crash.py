"""What a run leaves that is ended, and what is published after a crash and a resume: the bytes of
a run that nothing disturbed."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from dpo.publish.verify import verify
from tests.support.checkout import Checkout
from tests.support.waiting import wait_until

# steps of four pairs, each with a checkpoint: there is time to be killed between two of them
_SETTINGS = (
    *(f"{stage}.n_examples=160" for stage in ("sft", "preference")),
    *(f"{stage}.batch_size=4" for stage in ("sft", "preference")),
    *(f"{stage}.checkpoint_every=4" for stage in ("sft", "preference")),
    # whether the model is any good is not asked here
    "gate.force=true",
)
LONGER = tuple(word for setting in _SETTINGS for word in ("--set", setting))
_STEPS = 40
_KILLED_AFTER = 3
"""Steps of a stage."""


@pytest.mark.long
def test_a_run_killed_in_both_trainings_publishes_the_bytes_of_an_undisturbed_one(tmp_path):
    undisturbed = Checkout.make(tmp_path / "undisturbed").outcome(*LONGER)
    assert undisturbed["state"] == "succeeded", undisturbed
    checkout = Checkout.make(tmp_path / "killed")
    _kill_in(checkout, "sft")
    _kill_in(checkout, "preference")
    done = checkout.run(*LONGER, "--output", "json")
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["state"] == "succeeded", done.stderr
    assert (outcome["steps"]["sft"], outcome["steps"]["preference"]) == ("cached", "done")
    assert "preference: goes on after step" in done.stderr
    assert outcome["published"]["content_hash"] == undisturbed["published"]["content_hash"]
    (ours, theirs) = (verify(each["published"]["url"]) for each in (outcome, undisturbed))
    assert ours["files"] == theirs["files"]


@pytest.mark.long
def test_a_training_that_is_told_to_end_writes_a_checkpoint_first(tmp_path):
    checkout = Checkout.make(tmp_path / "ended")
    longer = [f"sft.{setting}" for setting in ("n_examples=8000", "batch_size=4", "n_epochs=9")]
    run = checkout.start(*(word for setting in longer for word in ("--set", setting)))

    def trains():
        events = (checkout.folder / "runs/history").glob("*/progress.jsonl")
        return any('"unit": "steps"' in file.read_text("utf-8") for file in events)

    wait_until(trains, 120, lambda: "no training began")
    os.kill(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert _newest_step(checkout, "sft") > 0
    assert checkout.processes() == []


@pytest.mark.long
def test_a_run_told_to_end_before_its_first_step_does_not_go_on(tmp_path):
    checkout = Checkout.make(tmp_path / "early")
    run = checkout.start()
    wait_until(lambda: any(map(_handles_sigterm, checkout.processes())), 60, lambda: "no worker")
    os.kill(run.pid, signal.SIGTERM)
    # a step that nobody told would be waited for 40 seconds
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "Ending" not in errors
    assert checkout.processes() == []


def _handles_sigterm(process: int) -> bool:
    """Whether it is the run's worker, and has come so far."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_text()
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return "pipelines.local_worker" in command and bool(caught >> (signal.SIGTERM - 1) & 1)


def _kill_in(checkout: Checkout, stage: str) -> None:
    """SIGKILL for the run and all its processes at once, when ``stage`` has made some steps."""
    run = checkout.start(*LONGER)
    wait_until(
        lambda: run.poll() is not None or _newest_step(checkout, stage) >= _KILLED_AFTER,
        240,
        lambda: f"{stage} kept no checkpoint",
    )
    assert run.poll() is None, f"the run ended before it was killed in {stage}"
    while running := checkout.processes():
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    run.communicate()
    assert _newest_step(checkout, stage) < _STEPS


def _newest_step(checkout: Checkout, stage: str) -> int:
    steps = [
        int(folder.name.removeprefix("step-"))
        for folder in (checkout.folder / "runs").glob(f"checkpoints/{stage}-*/step-*")
    ]
    return max(steps, default=0)
