"""Processes and threads that end with what started them, and how new processes begin."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType

from dpo.errors import DpoError

END_WITH = "DPO_END_WITH"
"""Environment variable with the process id that the steps of a local run must not outlive."""
_PR_SET_PDEATHSIG = 1


class FreshProcess(SpawnProcess):
    """A new interpreter that does not run the user's script again.

    Python would: a script without ``if __name__ == "__main__":`` that prepares data would start
    itself once more in every worker. Nothing that we send to a worker is defined in a script.
    """

    def start(self) -> None:
        """Start it; what Python asks ``__main__`` for meanwhile is not there."""
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = script


class FreshContext(SpawnContext):
    """For ``ProcessPoolExecutor``: its workers are each a `FreshProcess`."""

    Process = FreshProcess


@contextmanager
def repeated(act: Callable[[], bool | None], seconds: float, name: str) -> Iterator[None]:
    """Call ``act`` in a thread while the block runs, until it returns True.

    Args:
        act: What is done.
        seconds: Pause before each call.
        name: Of the thread.
    """
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds) and not act():
            pass

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def told_to_end(error: DpoError | None = None) -> Iterator[None]:
    """SIGTERM, with which CI, `timeout` and a cluster end a job, is as Ctrl-C in here, and so is
    SIGHUP, of a terminal that is closed, unless the job is to outlive it (`nohup`).

    For the main thread of a command: what is half-written is removed as after Ctrl-C. Whatever else
    is raised after either is its work: numpy, interrupted while it is imported, ends in a
    RecursionError. In another thread, which no signal reaches, it changes nothing.

    Args:
        error: What is raised in the end where it was SIGTERM; without it a KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def end(number: int, _: object) -> None:
        asked.append(number)
        if number == signal.SIGHUP:
            _leave(terminals)
        raise KeyboardInterrupt

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, end)
    # a job that a shell put into the background ignores it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, end)
    try:
        yield
    except (KeyboardInterrupt, Exception) as problem:
        if signal.SIGTERM in asked and error:
            raise error from None
        if asked and not isinstance(problem, KeyboardInterrupt | DpoError):
            raise KeyboardInterrupt from problem
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(terminals: list[int]) -> None:
    """What is still to be said to a terminal that is gone would be an error each time.

    It says so twice, by the shell and by the kernel, which is no second wish to end.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        if not os.isatty(number):
            os.dup2(nowhere, number)
    os.close(nowhere)


def die_with_parent(parent: int) -> None:
    """Ask Linux to end this process when its parent ends, even by SIGKILL; elsewhere nothing.

    Args:
        parent: The process that started this one, as it has told: it may have ended while this one
            was still importing, and the kernel would name another by now.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # the parent ended before the request was made
        os.kill(os.getpid(), signal.SIGKILL)


def end_with(pid: int) -> None:
    """End this process as soon as process ``pid`` ends, though it is not our parent (Linux).

    kfp starts a step through a shell; the shell outlives the runner, and the step with it.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    watch = threading.Thread(target=_wait_and_end, args=(descriptor,), daemon=True)
    watch.start()


def _wait_and_end(descriptor: int) -> None:
    poll = select.poll()
    # readable when the process has ended
    poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)
