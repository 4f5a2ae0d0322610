"""Requests to end that reach a job before its processes can be told."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from dpo.distributed import launch, work, worker


def test_a_process_that_begins_after_sigterm_ends(tmp_path, monkeypatch):
    """Importing torch takes seconds in which nobody knows the number of the process."""
    with launch._pass_on_sigterm(tmp_path) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [signal.SIGTERM]
    told = []
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number)))
    launch.announce(tmp_path / "job.json", 0)
    assert told == [(os.getpid(), signal.SIGTERM)]


def test_a_process_that_begins_otherwise_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: 1 / 0)
    launch.announce(tmp_path / "job.json", 0)
    assert (tmp_path / "process-0").read_text() == str(os.getpid())


def test_ctrl_c_ends_a_process_without_a_traceback(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    file = tmp_path / "job.json"
    file.write_text(json.dumps({"launcher": 1, "timeout_seconds": 5}))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(work, "die_with_parent", lambda _: None)
    monkeypatch.setattr(work.Heartbeat, "start", lambda _: None)
    monkeypatch.setattr(work, "_connect", interrupted)
    monkeypatch.setattr(sys, "argv", ["worker", str(file)])
    assert worker.main() == 130
    assert not list(tmp_path.glob("error-*"))


def test_ctrl_c_while_a_process_imports_ends_it_without_a_traceback():
    """torch takes seconds; each process printed where its import was interrupted."""
    code = (
        "import os, signal, sys; from dpo.distributed import worker\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted()); worker.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_sigterm_is_passed_on_where_the_disk_is_full(tmp_path, monkeypatch):
    (tmp_path / "process-1").write_text("4711")
    told, end = [], os.kill

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with launch._pass_on_sigterm(tmp_path):
        monkeypatch.setattr(Path, "touch", full)
        monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number)))
        end(os.getpid(), signal.SIGTERM)
    assert told == [(4711, signal.SIGTERM)]


def test_ctrl_c_after_several_processes_is_ctrl_c():
    """torch's agent kept it: `dpo train` ended in its traceback between two stages."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from torch.distributed.launcher.api import elastic_launch\n"
        "from dpo.distributed import launch\n"
        "with launch._pass_on_sigterm(Path()):\n"
        "    elastic_launch(launch._launch_config(0, 60), sys.executable)('-c', 'pass')\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    print('Ctrl-C')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "Ctrl-C\n", done.stderr


def test_what_keeps_no_checkpoints_speaks_of_none_when_it_is_stopped(tmp_path):
    """SIGTERM during a reference step over several processes."""
    told = launch._first_error(tmp_path, None, "reference")
    assert (told.exit_code, "checkpoint" in str(told)) == (75, False)
    assert told.found.startswith("reference was asked to stop")
    assert "last checkpoint" in str(launch._first_error(tmp_path, None, "sft"))


def test_what_nccl_does_to_a_process_that_waits_too_long_is_explained(tmp_path):
    failed = SimpleNamespace(get_first_failure=lambda: (3, SimpleNamespace(exitcode=-6)))
    said = str(launch._first_error(tmp_path, failed, None))
    assert "process 3 ended with exit code -6 (SIGABRT)" in said
    assert "usually NCCL" in said
    assert "running out of memory" not in said


def test_torch_2_11_is_not_given_what_it_does_not_have():
    def old(min_nodes, monitor_interval):
        """Without ``shutdown_timeout``."""

    assert launch._shutdown(old) == {}
    config = launch._launch_config(0, 60)
    assert getattr(config, "shutdown_timeout", 10) == 10


def test_a_signal_without_a_name_is_told_by_its_number(tmp_path):
    """Of the real-time ones Python names two; the message failed over the others."""
    failed = SimpleNamespace(get_first_failure=lambda: (3, SimpleNamespace(exitcode=-35)))
    said = str(launch._first_error(tmp_path, failed, None))
    assert "process 3 ended with exit code -35\n" in said
