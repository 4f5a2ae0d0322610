"""The lease in a real store: renewed by its holder, watched by others."""

import threading
import time

from dpo.nodes import lease
from dpo.storage.store import open_store


def test_a_lease_that_is_renewed_does_not_expire_and_one_that_is_not_does(tmp_path):
    output = (tmp_path / "output").as_uri()
    expired = threading.Event()
    with lease.held(output, 3.0):
        watch = lease.Watch(output, 3.0, expired.set)
        time.sleep(5)
        assert (expired.is_set(), watch.abandoned) == (False, False)
    assert expired.wait(30)
    assert watch.abandoned
    watch.end()


def test_a_watch_without_any_lease_expires(tmp_path):
    expired = threading.Event()
    lease.Watch((tmp_path / "output").as_uri(), 0.5, expired.set)
    assert expired.wait(10)


def test_a_removed_lease_leaves_nothing(tmp_path):
    output, store = (tmp_path / "output").as_uri(), open_store(tmp_path.as_uri())
    with lease.held(output, 5):
        assert list(store.list()) == ["output.lease"]
    lease.remove(output)
    assert list(store.list()) == []
