"""A process that falls silent is named; one that has done its work is not."""

import time

import pytest
from torch.distributed import TCPStore

from dpo.distributed import heartbeat
from dpo.distributed.heartbeat import Heartbeat
from tests.support.programs import free_port


@pytest.mark.parametrize("done", [True, False])
def test_one_that_has_done_its_work_is_not_missed(done, monkeypatch):
    """The first process still writes a report, or asks a judge, when the others have ended."""
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    lost = []
    first, second = (Heartbeat(rank, 2, 1.0, lost.append) for rank in (0, 1))
    first.start()
    if done:
        second.start()
        time.sleep(0.6)
        second.stop()
    else:
        # it says once that it lives, and dies
        store.set(f"{heartbeat._PREFIX}/1", "1 0 other lives")
    deadline = time.monotonic() + (2 if done else 20)
    while not lost and time.monotonic() < deadline:
        time.sleep(0.05)
    first.stop()
    assert bool(lost) is not done
    assert all(text == "rank 1 on host other" for text in lost)
    del store
