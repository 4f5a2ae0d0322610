"""A process that falls silent is named; one that has done its work is not."""

import signal
import time

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from dpo.config.losses import SFTLoss
from dpo.data.packing import pack
from dpo.data.tokenize import TokenizedExample
from dpo.distributed import heartbeat, work
from dpo.distributed.heartbeat import Heartbeat
from dpo.train.step import Objective
from tests.distributed.test_weights import SMALL
from tests.modeling.architectures import random_model
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


def test_who_has_made_fewer_passes_is_behind():
    """One that hangs in its own work, and lives, is named by what it has not come to."""
    heart = Heartbeat(0, 3, 10.0, print)
    for rank, begun in enumerate((7, 7, 6)):
        heart._note(rank, f"1 {begun} there lives")
    assert heart.behind() == "rank 2 on host there"


@pytest.mark.parametrize("quiet", [0.0, 11.0, 19.5])
def test_an_operation_that_ends_its_wait_first_names_who_is_silent(quiet, monkeypatch):
    """Rank 1 is one operation behind in all cases; only one silent all the time is said to be."""
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    heart = Heartbeat(0, 2, 20.0, print)
    heart._note(0, "9 7 here lives")
    heart._note(1, "8 6 there lives")
    heart._seen[1].changed -= quiet
    told = []
    error = RuntimeError("Timed out waiting 20000ms for recv operation to complete")
    try:
        work._other(error, heart, lambda found, lost: told.append(str(found)), 20.0)
    finally:
        signal.signal(signal.SIGTERM, before)
    said = (
        "no answer for 20 s from rank 1" if quiet > 19 else "the connection to rank 1 on host there"
    )
    assert said in told[0]


def test_every_pass_of_training_counts(monkeypatch):
    """Before the pass: where another process hangs, its own waits for weights of that one."""
    monkeypatch.setattr(heartbeat, "_begun", 0)
    model = random_model("llama", {**SMALL, "tie_word_embeddings": False})
    example = TokenizedExample("0", np.ones(4, np.int32), (np.ones(3, np.int32),))
    (row,) = pack([example], 100)

    def waits(*_):
        raise TimeoutError

    objective = Objective(model, SFTLoss(), torch.float32, 100, scorer=waits)
    with pytest.raises(TimeoutError):
        objective.figures(row, None, "train")
    assert heartbeat._begun == 1
