"""What is published after a crash and a resume: the bytes of a run that nothing disturbed."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dpo.publish.verify import verify
from tests.support.checkout import Checkout

# 40 steps of four pairs, each with a checkpoint: there is time to be killed between two of them
_SETTINGS = (
    *(f"{stage}.n_examples=160" for stage in ("sft", "preference")),
    *(f"{stage}.batch_size=4" for stage in ("sft", "preference")),
    *(f"{stage}.checkpoint_every=4" for stage in ("sft", "preference")),
    # whether the model is any good is not asked here
    "gate.force=true",
)
LONGER = tuple(word for setting in _SETTINGS for word in ("--set", setting))
_KILLED_AFTER = 3
"""Checkpoints of a stage."""


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
    assert outcome["published"]["content_hash"] == undisturbed["published"]["content_hash"]
    (ours, theirs) = (verify(each["published"]["url"]) for each in (outcome, undisturbed))
    assert ours["files"] == theirs["files"]


def _kill_in(checkout: Checkout, stage: str) -> None:
    """SIGKILL for the run and all its processes, when ``stage`` has kept some checkpoints."""
    run = subprocess.Popen(
        checkout.command(*LONGER),
        cwd=checkout.folder,
        env=checkout.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not (found := _newest_step(checkout, stage)) or found < _KILLED_AFTER:
        assert run.poll() is None, f"the run ended before it was killed in {stage}"
        assert time.monotonic() < deadline, f"{stage} kept no checkpoint"
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert _newest_step(checkout, stage) < 40


def _newest_step(checkout: Checkout, stage: str) -> int:
    steps = [
        int(folder.name.removeprefix("step-"))
        for folder in Path(checkout.folder / "runs").glob(f"checkpoints/{stage}-*/step-*")
    ]
    return max(steps, default=0)
