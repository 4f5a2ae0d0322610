"""Faults while a model is published, with a real MinIO server.

After each of them ``latest.json`` names a complete, verified version, the next try succeeds, and
what is left over is removed by ``dpo retain``.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import minio.time
import pytest

from dpo.cli import main
from dpo.errors import (
    ObjectMissing,
    StoreAccessDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from dpo.publish.versions import list_versions, retain
from dpo.storage import s3_client
from dpo.storage.store import open_store
from tests.publish.conftest import MIB, Model, check_store
from tests.support.minio import running_server
from tests.support.programs import NotHere
from tests.support.proxy import proxy_to
from tests.support.waiting import wait_until

pytestmark = pytest.mark.minio


@pytest.fixture
def server(tmp_path, no_store_variables, monkeypatch):
    """A server of this test's own, that it may kill."""
    try:
        with running_server(tmp_path / "minio") as running:
            for name, value in running.environment().items():
                monkeypatch.setenv(name, value)
            yield running
    except NotHere as error:
        pytest.skip(f"{error} (or run: python -m tests.support.minio --ensure)")


@pytest.fixture
def line(server, monkeypatch):
    """A proxy between us and the server."""
    with proxy_to(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


URL = "s3://models/team"


def leftovers(server):
    """Unfinished multipart uploads, as MinIO keeps them."""
    folder = server.data / ".minio.sys" / "multipart"
    return [path for path in folder.rglob("xl.meta")] if folder.exists() else []


def check_clean(server, url, versions):
    """Nothing is there but these versions and ``latest.json``, after the clean-up."""
    retain(url, keep=len(versions), grace_hours=0)
    found = list_versions(url)
    assert {version.content_hash for version in found} == {v.content_hash for v in versions}
    assert all(version.complete for version in found)
    keys = set(open_store(url).list())
    expected = {f"policy/{v.content_hash}/{path}" for v in found for path in v.files}
    assert keys == {"policy/latest.json", *expected}
    assert leftovers(server) == []


def in_background(call):
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def test_a_server_that_is_killed_and_comes_back(server, line, models):
    first = models[0].publish(URL, create=True)
    line.bytes_per_s = 60 * MIB
    begun = line.sent
    future = in_background(lambda: models[1].publish(URL))
    wait_until(lambda: line.sent > begun + 15 * MIB)
    server.kill()
    time.sleep(1)
    server.start()
    second = future.result(120)
    assert check_store(URL, [second]).previous == (first.content_hash,)
    check_clean(server, URL, [first, second])


def test_a_server_that_is_killed_for_good(server, line, models):
    first = models[0].publish(URL, create=True)
    line.bytes_per_s = 60 * MIB
    begun = line.sent
    future = in_background(lambda: models[1].publish(URL, retry_seconds=1, deadline_seconds=15))
    wait_until(lambda: line.sent > begun + 15 * MIB)
    server.kill()
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"tries in"):
        future.result(60)
    assert time.monotonic() - start < 15
    line.bytes_per_s = None
    server.start()
    check_store(URL, [first])
    second = models[1].publish(URL)
    check_store(URL, [second])
    # the mark of the publisher that failed counts until its deadline
    wait_until(lambda: not retain(URL, 2, 0).busy and not marks(URL), 30)
    check_clean(server, URL, [first, second])


def marks(url):
    return [key for key in open_store(url).list() if "/publishing/" in key]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root: run as root")
def test_a_disk_that_is_full(tmp_path, no_store_variables, monkeypatch, models):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mounted(disk, "size=96m"):
        pytest.skip("a tmpfs cannot be mounted here: run with the capability SYS_ADMIN")
    try:
        with running_server(disk / "data") as server:
            for name, value in server.environment().items():
                monkeypatch.setenv(name, value)
            first = models[0].publish(URL, create=True)
            large = Model(tmp_path / "large", 3, sizes=(90 * MIB,))
            with pytest.raises(StoreFull, match="no space left"):
                large.publish(URL, deadline_seconds=1)
            check_store(URL, [first])
            assert mounted(disk, "remount,size=400m")
            # the server looks at its disk about once a second
            time.sleep(2.5)
            second = large.publish(URL)
            check_store(URL, [second])
            wait_until(lambda: not retain(URL, 2, 0).busy and not marks(URL), 30)
            check_clean(server, URL, [first, second])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def mounted(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("hours", [-1, 1], ids=["behind", "ahead"])
def test_a_clock_that_is_an_hour_off(bucket_url, models, monkeypatch, hours):
    first = models[0].publish(bucket_url, create=True)
    right = minio.time.utcnow
    with monkeypatch.context() as patch:
        patch.setattr(minio.time, "utcnow", lambda: right() + timedelta(hours=hours))
        way = "behind" if hours < 0 else "ahead of"
        with pytest.raises(StoreAccessDenied, match=rf"clock.* (59|60) minutes {way}") as caught:
            models[1].publish(bucket_url)
        assert "set the clock" in caught.value.fix
    check_store(bucket_url, [first])
    check_store(bucket_url, [models[1].publish(bucket_url)])


def test_a_clock_that_is_off_and_no_body_to_say_so(bucket_url, models, monkeypatch):
    """With the region set, the first request is a HEAD: its refusal has no code."""
    models[0].publish(bucket_url, create=True)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    right = minio.time.utcnow
    monkeypatch.setattr(minio.time, "utcnow", lambda: right() - timedelta(hours=1))
    with pytest.raises(StoreAccessDenied, match="60 minutes behind"):
        models[1].publish(bucket_url)


def test_wrong_credentials_leave_what_is_published(bucket_url, models, monkeypatch):
    first = models[0].publish(bucket_url, create=True)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-planted-value")
        with pytest.raises(StoreAccessDenied, match="secret key") as caught:
            models[1].publish(bucket_url)
        assert "planted" not in str(caught.value)
    check_store(bucket_url, [first])
    check_store(bucket_url, [models[1].publish(bucket_url)])


def test_a_missing_bucket_is_made_only_when_allowed(bucket_url, models):
    with pytest.raises(ObjectMissing, match="there is no bucket"):
        models[0].publish(bucket_url)
    check_store(bucket_url, [models[0].publish(bucket_url, create=True)])


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["verify"], "no published model is here"),
        (["pull", "output=pulled"], "no published model is here"),
        (["lineage"], "no published model is here"),
        (["publish", "--rollback"], "no published model is here"),
        (["compare"], "there is no evaluation here"),
    ],
)
def test_readers_are_told_of_a_missing_bucket(
    bucket_url, tmp_path, monkeypatch, capsys, command, missing
):
    monkeypatch.chdir(tmp_path)
    assert main([*command, f"{bucket_url}/x"]) == 1
    said = capsys.readouterr().err
    assert f"there is no bucket {bucket_url.removeprefix('s3://')}" in said
    assert "check the URL" in said
    assert "create_bucket" not in said
    open_store(bucket_url).check(create=True)
    assert main([*command, f"{bucket_url}/x"]) == 1
    assert missing in capsys.readouterr().err
    # and no folder is made for having been asked for
    assert main([*command, f"file://{tmp_path}/none/x"]) == 1
    assert missing in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_slow_connection_is_not_taken_for_a_dead_one(line, server, tmp_path, monkeypatch):
    """A part of 16 MiB takes 4 s on this line, a connection's timeout is 2 s."""
    monkeypatch.setattr(s3_client, "_CONNECT_SECONDS", 2.0)
    Model(tmp_path / "model", 4, sizes=(MIB,)).publish(URL, create=True)
    other = Model(tmp_path / "other", 5, sizes=(17 * MIB,))
    line.bytes_per_s = 4 * MIB
    begun = line.sent
    published = other.publish(URL, retry_seconds=5)
    line.bytes_per_s = None
    assert line.sent - begun < 18 * MIB, "a part was sent twice"
    check_store(URL, [published])


def test_the_deadline_ends_an_upload_that_goes_on(line, server, models):
    first = models[0].publish(URL, create=True)
    line.bytes_per_s = 8 * MIB
    with pytest.raises(StoreUnavailable, match="the time for the upload is over"):
        # large enough that the parts do not all wait in memory
        Model(models[1].folder, 6, sizes=(130 * MIB,)).publish(URL, deadline_seconds=3)
    line.bytes_per_s = None
    check_store(URL, [first])


def test_an_upload_that_is_interrupted_ends_at_once(line, server, tmp_path):
    """Ctrl-C while parts of 16 MiB, which take 8 s each here, are on their way."""
    model = Model(tmp_path / "model", 7, sizes=(40 * MIB, 1000))
    process = start_publisher(model, URL, 60.0)
    open_store(URL).check(create=True)
    line.bytes_per_s = 2 * MIB
    process.stdin.write("\n")
    process.stdin.flush()
    wait_until(lambda: line.sent > 3 * MIB)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - start < 5
    line.bytes_per_s = None
    assert leftovers(server) == []
    # the whole small file was the first ever of its name: the mark says that it is no other's
    assert len(retain(URL, 1, 0).removed) == 1
    assert list(open_store(URL).list()) == []


def test_a_connection_that_is_cut_again_and_again(line, server, models):
    first = models[0].publish(URL, create=True)
    line.bytes_per_s = 60 * MIB
    line.cut_at = [line.sent + n * 9 * MIB for n in range(1, 5)]
    second = models[1].publish(URL)
    line.bytes_per_s = None
    assert line.cuts == 4
    check_store(URL, [second])
    check_clean(server, URL, [first, second])


def test_a_repeated_publish_sends_no_file(line, server, models):
    """By the bytes on the line: questions, but nothing of the 37 MiB."""
    models[0].publish(URL, create=True)
    before = line.sent
    again = models[0].publish(URL)
    assert again.unchanged
    assert again.bytes_moved == 0
    assert line.sent - before < 20_000


def test_what_is_damaged_on_the_way_is_refused_by_the_server(bucket_url, models, monkeypatch):
    """The checksum is of the file; the bytes that arrive are others."""
    from dpo.storage import s3

    class Damaged(s3.Body):
        def __iter__(self):
            for number, piece in enumerate(super().__iter__()):
                changed = bytearray(piece)
                changed[0] ^= 1 if number == 0 else 0
                yield memoryview(changed)

    first = models[0].publish(bucket_url, create=True)
    with monkeypatch.context() as patch:
        patch.setattr(s3, "Body", Damaged)
        with pytest.raises(StoreError, match=r"(?i)checksum|digest"):
            models[1].publish(bucket_url, retry_seconds=0.5)
    check_store(bucket_url, [first])


@pytest.mark.parametrize("same", [True, False], ids=["same content", "other content"])
def test_two_publishers_at_once(bucket_url, models, same):
    open_store(bucket_url).check(create=True)
    pair = [models[0], models[0] if same else models[1]]
    barrier = threading.Barrier(2)

    def publish(model):
        barrier.wait()
        return model.publish(bucket_url)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(publish, pair))
    latest = check_store(bucket_url, done)
    others = {published.content_hash for published in done} - {latest.content_hash}
    assert set(latest.previous) == others
    assert all(version.complete for version in list_versions(bucket_url))


_PUBLISHER = """
import sys
from pathlib import Path
from tests.publish.conftest import Model
print("ready", flush=True)
sys.stdin.readline()
model = Model.__new__(Model)
model.folder, model.files = Path(sys.argv[1]), eval(sys.argv[2])
model.publish(sys.argv[3], deadline_seconds=float(sys.argv[4]))
print("done", flush=True)
"""


def start_publisher(model, url, deadline_seconds):
    """A process that has imported everything and waits for a line."""
    files = repr([(e.path, e.size, e.sha256) for e in model.files])
    code = _PUBLISHER.replace(
        "eval(sys.argv[2])",
        "[__import__('dpo.storage.manifest').storage.manifest.FileEntry(*e) "
        "for e in eval(sys.argv[2])]",
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model.folder), files, url, str(deadline_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def kill_publishers(server, tmp_path, count, seed):
    """Publishers of ever new content, killed at random moments; returns how many got through."""
    moments = random.Random(seed)
    first = Model(tmp_path / "model-0", 1000).publish(URL, create=True)
    allowed, through, longest = [first], 0, 0.5
    for number in range(1, count + 1):
        model = Model(tmp_path / f"model-{number}", 1000 + number)
        process = start_publisher(model, URL, 1.0)
        process.stdin.write("\n")
        process.stdin.flush()
        start = time.monotonic()
        try:
            process.wait(moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            longest = min(longest * 1.3, 10.0)
        process.wait()
        if "done" in process.stdout.read():
            through += 1
            longest = max(0.5, time.monotonic() - start)
        process.stdin.close()
        process.stdout.close()
        # either it was named already, or the one before still is
        hashes = [version.content_hash for version in list_versions(URL) if version.latest]
        assert len(hashes) == 1
        check_store(URL, [*allowed, _as_published(model)])
        published = model.publish(URL)
        check_store(URL, [published])
        allowed.append(published)
    wait_until(lambda: not retain(URL, len(allowed), 0).busy and not marks(URL), 30)
    check_clean(server, URL, allowed)
    return through


def _as_published(model):
    from types import SimpleNamespace

    from dpo.storage.manifest import content_hash

    return SimpleNamespace(content_hash=content_hash({e.path: e.sha256 for e in model.files}))


def test_publishers_that_are_killed(server, tmp_path):
    kill_publishers(server, tmp_path, 3, seed=1)


@pytest.mark.long
def test_publishers_that_are_killed_many_times(server, tmp_path):
    kill_publishers(server, tmp_path, 25, seed=2)
