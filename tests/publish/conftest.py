"""Folders to publish, and what must be true of a store after every fault."""

import hashlib
import random
from pathlib import Path

import pytest

from dpo.publish.verify import verify
from dpo.publish.version import publish_files
from dpo.storage import provenance
from dpo.storage.manifest import FileEntry
from dpo.storage.published import read_latest
from dpo.storage.store import open_store
from tests.publish.pipeline import Pipeline

MIB = 1 << 20


def make_folder(folder: Path, seed: int, sizes=(20 * MIB, 17 * MIB, 1000)) -> list[FileEntry]:
    """Files of random bytes: two of several parts, and a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, size in enumerate(sizes):
        data = random.Random(seed * 100 + number).randbytes(size)
        (folder / f"file-{number}").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append(FileEntry(f"file-{number}", size, digest))
    return entries


class Model:
    """A folder that can be published again and again."""

    def __init__(self, folder: Path, seed: int, **kwargs) -> None:
        self.folder, self.files = folder, make_folder(folder, seed, **kwargs)

    def publish(self, url, *, retry_seconds=30.0, deadline_seconds=60.0, create=False):
        store = open_store(url)
        store.check(create=create)
        store.retry_seconds = retry_seconds
        return publish_files(
            store, self.folder, self.files, "policy", deadline_seconds=deadline_seconds
        )


@pytest.fixture
def models(tmp_path):
    """Two models with different content."""
    return Model(tmp_path / "first", 1), Model(tmp_path / "second", 2)


def check_store(url, allowed):
    """``latest.json`` names a complete, verified version that is one of ``allowed``."""
    latest = read_latest(open_store(f"{url}/policy"))
    assert latest is not None
    assert latest.content_hash in {published.content_hash for published in allowed}
    assert verify(f"{url}/policy")["content_hash"] == latest.content_hash
    return latest


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_IMAGE", "registry/train@sha256:" + "9" * 64)
    monkeypatch.setenv("DPO_COMMIT", "0123abc")
    # where readers remember what they saw
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    provenance._constant.cache_clear()
    yield Pipeline(tmp_path, f"file://{tmp_path}/store")
    provenance._constant.cache_clear()
