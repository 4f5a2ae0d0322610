"""What the thread does that completes a checkpoint."""

import threading

import torch

from dpo.train import checkpoint
from dpo.train.checkpoint import Checkpoints, Position
from dpo.train.place import Place


def saved(folder):
    keeper = Checkpoints(Place(folder), {}, keep=1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    keeper.save(model, optimizer, Position(steps=3), {"metrics.jsonl": "{}\n"})
    keeper.finish()


def test_it_is_whole_when_it_is_named(tmp_path):
    saved(tmp_path)
    assert (tmp_path / "LATEST").read_text() == "step-3\n"
    assert (tmp_path / "step-3/metrics.jsonl").read_text() == "{}\n"
    assert [path.name for path in tmp_path.glob(".step-*")] == []


def test_another_process_that_is_gone_leaves_no_traceback(tmp_path, monkeypatch):
    """The training's next collective operation fails as well, and names the process."""

    def broken(*_):
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(checkpoint, "gather", broken)
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    saved(tmp_path)
    assert seen == []
    assert not (tmp_path / "LATEST").exists()
