"""A step ends with the run that started it, though a shell stands between, and as it is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo.storage.processes import told_to_end

STEP = (
    "import os, sys, time; from dpo.storage.processes import end_with; "
    "end_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(60)"
)
RUNNER = (
    "import os, subprocess, sys; subprocess.run(['sh', '-c', "
    "f'{sys.executable} -c \"$0\" {os.getpid()}; true', sys.argv[1]])"
)


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    # what nobody has waited for yet is a zombie
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_a_step_does_not_outlive_a_runner_that_was_killed():
    command = [sys.executable, "-c", RUNNER, STEP]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as runner:
        step = int(runner.stdout.readline())
        assert is_running(step)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        deadline = time.monotonic() + 10
        while is_running(step) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_running(step)


def test_a_step_of_a_runner_that_is_gone_ends_at_once():
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = subprocess.run([sys.executable, "-c", STEP, str(gone.pid)], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("module", "start"),
    [
        ("dpo.data.check", "_start_worker"),
        ("pipelines.service.submission", "_start_process"),
    ],
)
def test_a_worker_ends_whose_parent_ended_while_it_imported(module, start):
    gone = subprocess.Popen(["true"])
    gone.wait()
    script = f"import {module} as m, time; m.{start}({gone.pid}); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("program", ["pipelines.local_worker", "pipelines.service.one_run"])
def test_a_program_ends_whose_parent_ended_while_it_imported(program, tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-m", program, str(tmp_path), str(gone.pid)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_an_interrupt_makes_of_an_import_is_the_interrupt(number):
    """A package whose import was interrupted fails when it is used: numpy with a RecursionError."""
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise RecursionError from None

    with pytest.raises(KeyboardInterrupt), told_to_end():
        work()
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_other_errors_are_no_interrupt():
    with pytest.raises(RecursionError), told_to_end():
        raise RecursionError
