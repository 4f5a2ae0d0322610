"""What the thread does that completes a checkpoint."""

import errno
import fcntl
import shutil
import threading

import pytest
import torch

from dpo.errors import ArtifactError, StoreError
from dpo.storage.store import open_store
from dpo.train import checkpoint
from dpo.train.attempt import Attempt
from dpo.train.checkpoint import Checkpoints
from dpo.train.place import Place
from dpo.train.position import Position


def begun(folder):
    keeper = Checkpoints(Place(folder), {}, keep=1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    keeper.save(model, optimizer, Position(steps=3), {"metrics.jsonl": "{}\n"})
    return keeper, model, optimizer


def saved(folder):
    begun(folder)[0].finish()


def test_it_is_whole_when_it_is_named(tmp_path):
    saved(tmp_path)
    assert (tmp_path / "LATEST").read_text() == "step-3\n"
    assert (tmp_path / "step-3/metrics.jsonl").read_text() == "{}\n"
    assert [path.name for path in tmp_path.glob(".step-*")] == []


def test_a_checkpoint_that_is_being_written_is_neither_waited_for_nor_counted_as_a_stop(
    tmp_path, monkeypatch
):
    """The second was due ten seconds after the first. Where that took a minute to write, training
    stood still for the rest of it, and for that the third came an hour later."""
    allowed, write = threading.Event(), checkpoint.write_manifest

    def slowly(*given):
        assert allowed.wait(60)
        write(*given)

    monkeypatch.setattr(checkpoint, "write_manifest", slowly)
    keeper, model, optimizer = begun(tmp_path)
    assert keeper.period.seconds("auto") == 3600
    threading.Timer(2, allowed.set).start()
    # asked for by SIGTERM or checkpoint_every
    keeper.save(model, optimizer, Position(steps=4), {})
    keeper.finish()
    assert keeper.period.stopped_seconds < 1
    assert keeper.period.seconds("auto") < 200
    assert (tmp_path / "LATEST").read_text() == "step-4\n"


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


def test_a_folder_that_is_removed_while_it_is_written_to_is_one_message(
    tmp_path, monkeypatch, capsys
):
    """By a person, or by a second run of the same output that ended first. The thread ended in a
    traceback, for which other processes would have waited."""
    place = tmp_path / "kept"

    def removed(*_):
        shutil.rmtree(place)
        raise FileNotFoundError(2, "No such file or directory", str(place))

    monkeypatch.setattr(checkpoint, "write_manifest", removed)
    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    with pytest.raises(ArtifactError, match=r"could not be written: .* No such file"):
        saved(place)
    assert seen == []
    assert "training goes on" in capsys.readouterr().err


def test_a_second_run_leaves_what_the_first_one_writes(tmp_path, monkeypatch):
    """Of the same training, in the same place: it removed that as what a killed run had left."""
    allowed, write = threading.Event(), checkpoint.write_manifest

    def slowly(*given):
        assert allowed.wait(60)
        write(*given)

    monkeypatch.setattr(checkpoint, "write_manifest", slowly)
    first, *_ = begun(tmp_path)
    abandoned = tmp_path / ".step-2.0123abcd.partial/tensors"
    abandoned.mkdir(parents=True)
    (tmp_path / ".0123abcd.alive").touch()
    second = Checkpoints(Place(tmp_path), {}, keep=1)
    assert second.find() is None
    assert not abandoned.parent.exists()
    allowed.set()
    first.finish()
    first.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "identity.json", "step-3"]


@pytest.mark.parametrize("looks_or_removes", ["looks", "removes"])
def test_a_run_that_tidies_while_another_begins_does_not_take_it_for_dead(
    tmp_path, monkeypatch, looks_or_removes
):
    """Between the making of its file and its lock: the file was removed, or the lock refused; the
    next run then removed the checkpoint that this one was writing."""
    first, second, third = (Attempt(tmp_path) for _ in range(3))
    lock, meanwhile = fcntl.flock, []

    def flock(file, how):
        if how & fcntl.LOCK_SH and not meanwhile:
            meanwhile.append(how)
            if looks_or_removes == "removes":
                second.tidy()
            else:
                raise BlockingIOError(errno.EAGAIN, "another looks at it")
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    partial = first.begin(3)
    partial.mkdir()
    third.tidy()
    assert partial.is_dir()
    first.end()
    third.tidy()
    assert list(tmp_path.iterdir()) == []


def test_where_the_file_system_knows_no_locks_a_checkpoint_is_begun_all_the_same(
    tmp_path, monkeypatch
):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    saved(tmp_path)
    assert (tmp_path / "LATEST").read_text() == "step-3\n"
    Attempt(tmp_path).tidy()
    assert list(tmp_path.glob(".*")) == []


def in_store(tmp_path):
    store = open_store(f"file://{tmp_path}/store")
    return Checkpoints(Place(tmp_path / "here", store), {}, keep=1), store


def test_parts_of_a_checkpoint_that_a_store_has_no_room_for_are_removed(tmp_path, monkeypatch):
    """They stayed until the end of the training, and a full store stayed full."""
    keeper, store = in_store(tmp_path)
    upload = type(store).upload

    def refused(self, path, key, sha256):
        if path.suffix == ".distcp":
            raise StoreError("the store has no space left", where=key)
        upload(self, path, key, sha256)

    monkeypatch.setattr(type(store), "upload", refused)
    model, optimizer = half_used()
    keeper.save(model, optimizer, Position(steps=3), {"metrics.jsonl": "{}\n"})
    with pytest.raises(StoreError, match="no space left"):
        keeper.finish()
    assert list(store.list()) == []


def test_parts_that_a_killed_run_left_in_a_store_go_with_the_next_checkpoint(tmp_path):
    """Those of a later step are left: they may be another run's, or are written again."""
    keeper, store = in_store(tmp_path)
    for number in (2, 4):
        store.write(f"step-{number}/tensors/__0_0.distcp", b"half of it")
    model, optimizer = half_used()
    keeper.save(model, optimizer, Position(steps=3), {})
    keeper.finish()
    folders = {key.partition("/")[0] for key in store.list("step-")}
    assert folders == {"step-3", "step-4"}


@pytest.mark.parametrize("text", ["[]", "[1]", "3", '"a"'])
def test_an_identity_that_is_none_is_one_message(tmp_path, text):
    saved(tmp_path)
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises(ArtifactError, match="have format"):
        Checkpoints(Place(tmp_path), {}, keep=1).find()


class _HalfUsed(torch.nn.Module):
    """The second layer takes no part, as a model's image tower where there are texts alone."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

    def train_once(self, optimizer, *, all_of_it=False):
        self.used(torch.ones(2)).sum().backward()
        if all_of_it:
            self.idle(torch.ones(2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def half_used():
    torch.manual_seed(0)
    model = _HalfUsed()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_that_no_gradient_has_reached_go_on_as_they_are(tmp_path):
    keeper = Checkpoints(Place(tmp_path), {}, keep=1)
    model, optimizer = half_used()
    model.train_once(optimizer)
    keeper.save(model, optimizer, Position(steps=1), {})
    keeper.finish()
    resumed, its_optimizer = half_used()
    keeper.load(tmp_path / "step-1", resumed, its_optimizer)
    assert resumed.idle.weight not in its_optimizer.state
    for one, its in ((model, optimizer), (resumed, its_optimizer)):
        # a first gradient only now: AdamW counts its steps from here
        one.train_once(its, all_of_it=True)
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name


def test_a_checkpoint_of_another_model_is_one_message(tmp_path):
    saved(tmp_path)
    model, optimizer = half_used()
    keeper = Checkpoints(Place(tmp_path), {}, keep=1)
    with pytest.raises(ArtifactError, match="does not fit this run"):
        keeper.load(tmp_path / "step-3", model, optimizer)


def test_a_checkpoint_that_another_run_removed_meanwhile_says_so(tmp_path):
    """Two runs of one training at once: the advice to begin again would remove the other's."""
    keeper, model, optimizer = begun(tmp_path)
    keeper.finish()
    found = keeper.find()
    shutil.rmtree(found)
    with pytest.raises(ArtifactError, match="another run of the same training") as caught:
        keeper.load(found, model, optimizer)
    assert "resume" not in str(caught.value)


@pytest.mark.parametrize("where", ["a folder", "a store"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_is_not_given_up_for_ones_that_cannot_be_used(where, keep, tmp_path):
    """Both were damaged, so the training began anew: its own had lower numbers, and each went as
    soon as it was whole."""
    store = open_store(f"file://{tmp_path}/store") if where == "a store" else None
    root = tmp_path / ("store" if store else "here")
    place = Place(tmp_path / "here", store)
    model, optimizer = half_used()

    def keeper_after(*steps):
        keeper = Checkpoints(place, {}, keep)
        assert keeper.find() is None
        for step in steps:
            keeper.save(model, optimizer, Position(steps=step), {})
            keeper.finish()
        keeper.close()
        return keeper

    keeper_after(10, 20)
    for damaged in root.glob("step-*/position.json"):
        damaged.write_text("{")
    keeper_after(4, 5, 6)
    assert Checkpoints(place, {}, keep).find().name == "step-6"
    own = {path.parent.name for path in root.glob("step-?/manifest.json")}
    assert own == {f"step-{step}" for step in range(7 - keep, 7)}


def test_what_was_fetched_from_a_store_does_not_stay_on_the_disk(tmp_path):
    """It did until the end of the training, beside what was being written."""
    keeper, _ = in_store(tmp_path)
    model, optimizer = half_used()
    keeper.save(model, optimizer, Position(steps=3), {})
    keeper.finish()
    path = keeper.find()
    assert path.is_dir()
    assert keeper.load(path, model, optimizer).steps == 3
    assert not list((tmp_path / "here").glob("step-*"))
    assert keeper.find() == path
