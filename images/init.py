"""First process of a container: forwards signals to the command, reaps what it leaves behind.

Process number 1 ignores SIGTERM unless it asks for it, so ``docker stop`` would wait and then
kill. Usage: ``init.py COMMAND [ARGUMENT ...]``; exits as the command does, 128 + N after signal N.
"""

import os
import signal
import sys

_FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def main(command: list[str]) -> int:
    """Run ``command`` as the only child and return its exit code."""
    if not command:
        print("usage: init.py COMMAND [ARGUMENT ...]", file=sys.stderr)
        return 2
    # blocked until the child exists: a signal that comes in between is not lost
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    child = os.fork()
    if child == 0:
        _become(command)
    for number in _FORWARDED:
        signal.signal(number, lambda received, _frame: _forward(child, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    return _wait(child)


def _become(command: list[str]) -> None:
    # a group of its own, so that a signal reaches what a shell between us started
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        os._exit(127)


def _forward(child: int, number: int) -> None:
    try:
        os.killpg(child, number)
    except ProcessLookupError:
        # it has not made its group yet, or it is gone
        try:
            os.kill(child, number)
        except ProcessLookupError:
            return


def _wait(child: int) -> int:
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
