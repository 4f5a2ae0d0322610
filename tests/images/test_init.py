"""The first process of a container: exit codes, signals, children left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

INIT = Path(__file__).resolve().parents[2] / "images" / "init.py"


def run(*command):
    return subprocess.run(
        [sys.executable, str(INIT), *command], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("code", [0, 1, 3, 130])
def test_the_exit_code_is_the_commands(code):
    assert run("sh", "-c", f"exit {code}").returncode == code


def test_an_end_by_signal_is_128_and_its_number():
    assert run("sh", "-c", "kill -9 $$").returncode == 137


def test_a_command_that_is_not_there():
    done = run("no-such-command")
    assert done.returncode == 127
    assert done.stderr == "no-such-command: No such file or directory\n"


def test_without_a_command():
    done = run()
    assert done.returncode == 2
    assert "usage" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_a_command_behind_a_shell(number):
    """As in a pod, where a shell stands between; 42 is what the handler exits with."""
    program = (
        "import signal, sys, time; "
        f"signal.signal({int(number)}, lambda *_: sys.exit(42)); print('ready', flush=True); "
        "time.sleep(120)"
    )
    process = subprocess.Popen(
        [sys.executable, str(INIT), "sh", "-c", f'"$0" -c "{program}"; exit $?', sys.executable],
        stdout=subprocess.PIPE,
        text=True,
        # the test runner's own group must not get the signal
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.wait(100)
    process.stdout.close()
    # the shell itself dies of the signal, or passes on the exit code of its child
    assert process.returncode in (42, 128 + number)


def test_orphans_are_reaped_and_do_not_end_it():
    done = run("sh", "-c", "(sleep 0.1 &) ; sleep 0.5; exit 7")
    assert done.returncode == 7
