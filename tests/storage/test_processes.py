"""A step ends with the run that started it, though a shell stands between, and as it is told."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
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


@pytest.fixture
def heeded():
    """As in a terminal: a test run in the background ignores SIGINT, one under nohup SIGHUP."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_an_interrupt_makes_of_an_import_is_the_interrupt(heeded, number):
    """A package whose import was interrupted fails when it is used: numpy with a RecursionError."""
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(each) for each in ending]

    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise RecursionError from None

    with pytest.raises(KeyboardInterrupt), told_to_end():
        work()
    assert [signal.getsignal(each) for each in ending] == before


def test_a_job_that_is_to_outlive_its_terminal_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with told_to_end():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_ends_a_command_in_order(heeded):
    """Whose words would each be an error by then; what goes to a file is written."""
    code = (
        "import sys, time\n"
        "from dpo.storage.processes import told_to_end\n"
        "try:\n"
        "    with told_to_end():\n"
        "        print('begun', file=sys.stderr, flush=True)\n"
        "        time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(1)\n"
        "    print('Stopped.', file=sys.stderr, flush=True)\n"
        "    print('written')\n"
        "    sys.exit(130)\n"
    )
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=its_end,
        stdout=subprocess.PIPE,
        stderr=its_end,
        text=True,
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )
    os.close(its_end)
    assert os.read(terminal, 100).startswith(b"begun")
    os.close(terminal)
    assert process.communicate(timeout=60) == ("written\n", None)
    assert process.returncode == 130


def test_other_errors_are_no_interrupt():
    with pytest.raises(RecursionError), told_to_end():
        raise RecursionError
