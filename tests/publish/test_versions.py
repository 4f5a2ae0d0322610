"""Listing, rollback and clean-up; one suite for a folder and a real MinIO server."""

import json
import threading
import time

import pytest

from dpo.cli import main
from dpo.errors import ArtifactError, StoreError, StoreFull, WriteConflict
from dpo.publish import lease, version, versions
from dpo.publish.lease import being_retired, being_written
from dpo.publish.runs import record_plan
from dpo.publish.version import point_latest, publish_files, rollback
from dpo.publish.versions import list_versions, retain
from dpo.storage.published import read_latest
from dpo.storage.runs import read_run_manifest
from dpo.storage.store import open_store
from tests.publish.conftest import check_store, make_folder


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.minio)])
def url(request, tmp_path):
    if request.param == "folder":
        return f"file://{tmp_path}/store"
    made = f"{request.getfixturevalue('bucket_url')}/team"
    open_store(made).check(create=True)
    return made


def publish(url, tmp_path, seed, name="policy", **options):
    folder = tmp_path / f"model-{seed}"
    files = make_folder(folder, seed, sizes=(1000, 10))
    return publish_files(open_store(url), folder, files, name, **options)


def hashes(versions):
    return [found.content_hash for found in versions]


def test_the_list_has_the_latest_first(url, tmp_path):
    facts = {"run_id": "run-1"}
    done = [publish(url, tmp_path, seed, facts=facts) for seed in (1, 2, 3)]
    other = publish(url, tmp_path, 4, name="other")
    found = list_versions(url)
    assert [(v.name, v.content_hash, v.latest) for v in found] == [
        ("other", other.content_hash, True),
        ("policy", done[2].content_hash, True),
        ("policy", done[1].content_hash, False),
        ("policy", done[0].content_hash, False),
    ]
    assert {v.run_id for v in found if v.name == "policy"} == {"run-1"}
    assert all(v.complete and v.size > 1010 and len(v.files) == 3 for v in found)
    of_name = list_versions(f"{url}/policy")
    assert hashes(of_name) == hashes(found[1:])


def test_nothing_is_published(url):
    assert list_versions(url) == []


def test_a_rollback_goes_back_step_by_step(url, tmp_path):
    first, second, third = (publish(url, tmp_path, seed) for seed in (1, 2, 3))
    store = open_store(url)
    assert rollback(store, "policy") == second.content_hash
    assert rollback(store, "policy") == first.content_hash
    check_store(url, [first])
    with pytest.raises(ArtifactError, match="no earlier version"):
        rollback(store, "policy")
    # and forward again, by the version's hash or the start of it
    assert rollback(store, "policy", third.content_hash[:10]) == third.content_hash
    check_store(url, [third])
    assert read_latest(store, "policy").previous == (first.content_hash,)


def test_a_rollback_skips_what_was_removed(url, tmp_path):
    first, second, _ = (publish(url, tmp_path, seed) for seed in (1, 2, 3))
    store = open_store(url)
    store.delete(f"policy/{second.content_hash}/manifest.json")
    assert rollback(store, "policy") == first.content_hash
    with pytest.raises(ArtifactError, match="not complete"):
        rollback(store, "policy", second.content_hash)
    # the start of latest.json, which is no version
    with pytest.raises(ArtifactError, match="version latest does not exist"):
        rollback(store, "policy", "latest")
    with pytest.raises(ArtifactError, match="does not exist"):
        rollback(store, "policy", "abcdef")
    with pytest.raises(ArtifactError, match="no published model"):
        rollback(store, "other")


def test_publishing_what_was_rolled_back_makes_it_latest_again(url, tmp_path):
    first, second = publish(url, tmp_path, 1), publish(url, tmp_path, 2)
    rollback(open_store(url), "policy")
    again = publish(url, tmp_path, 2)
    assert (again.unchanged, again.bytes_moved) == (False, 0)
    assert check_store(url, [second]).previous == (first.content_hash,)


def test_the_last_k_stay(url, tmp_path):
    done = [publish(url, tmp_path, seed) for seed in (1, 2, 3, 4)]
    removed = retain(f"{url}/policy", keep=2).removed
    assert set(hashes(removed)) == {done[0].content_hash, done[1].content_hash}
    assert hashes(list_versions(url)) == [done[3].content_hash, done[2].content_hash]
    check_store(url, [done[3]])
    assert retain(url, keep=2).removed == []


def test_the_latest_stays_though_it_is_old(url, tmp_path):
    done = [publish(url, tmp_path, seed) for seed in (1, 2, 3)]
    rollback(open_store(url), "policy", done[0].content_hash)
    retain(url, keep=1)
    assert hashes(list_versions(url)) == [done[0].content_hash]
    check_store(url, [done[0]])


def test_each_name_keeps_its_own(url, tmp_path):
    one = publish(url, tmp_path, 1)
    two = publish(url, tmp_path, 2, name="other")
    assert retain(url, keep=1).removed == []
    assert {v.content_hash for v in list_versions(url)} == {one.content_hash, two.content_hash}


def test_what_is_being_written_stays(url, tmp_path):
    store = open_store(url)
    done = [publish(url, tmp_path, seed) for seed in (1, 2)]
    with being_written(store, "policy", done[0].content_hash, [], 60):
        result = retain(url, keep=1, grace_hours=0)
        assert hashes(result.busy) == [done[0].content_hash]
        assert result.removed == []
    assert hashes(retain(url, keep=1).removed) == [done[0].content_hash]


def test_an_unfinished_version_is_removed_when_its_time_is_over(url, tmp_path):
    store = open_store(url)
    publish(url, tmp_path, 1)
    store.write(f"policy/{'a' * 64}/half", b"half")
    assert hashes(retain(url, keep=1).busy) == ["a" * 64]
    assert hashes(retain(url, keep=1, grace_hours=0).removed) == ["a" * 64]
    assert not [key for key in store.list() if "a" * 64 in key]


def test_the_mark_of_a_killed_publisher_ends(url, tmp_path):
    store = open_store(url)
    hash_ = publish(url, tmp_path, 1).content_hash
    mark = f"policy/publishing/{hash_}/killed.json"
    store.write(mark, json.dumps({"files": ["x"], "seconds": 0}).encode())
    time.sleep(1.1)
    retain(url, keep=1)
    assert mark not in set(store.list())


def test_a_clean_up_of_one_name_leaves_what_is_being_written(url, tmp_path):
    """The URL ends in the name, so a mark's key begins with ``publishing/``."""
    store = open_store(url)
    publish(url, tmp_path, 1)
    store.write(f"policy/{'a' * 64}/half", b"half")
    with being_written(store, "policy", "a" * 64, ["half"], 60):
        assert [v.name for v in list_versions(f"{url}/policy")] == ["", ""]
        for _ in range(2):
            result = retain(f"{url}/policy", keep=1, grace_hours=0)
            assert (hashes(result.busy), result.removed) == (["a" * 64], [])
        assert store.read(f"policy/{'a' * 64}/half") == b"half"
        assert any(key.startswith("policy/publishing/") for key in store.list())


@pytest.mark.minio
@pytest.mark.parametrize("below", ["", "/policy"])
def test_a_clean_up_discards_the_uploads_of_a_killed_publisher(bucket_url, below):
    url, hash_ = f"{bucket_url}/team", "b" * 64
    store = open_store(url)
    store.check(create=True)
    mark = {"files": ["model.safetensors"], "seconds": 0}
    store.write(f"policy/publishing/{hash_}/killed.json", json.dumps(mark).encode())
    store._begin(f"policy/{hash_}/model.safetensors", "0" * 64)
    time.sleep(1.1)
    assert retain(f"{url}{below}", keep=1, grace_hours=0).unfinished == 1
    assert store.discard_unfinished(f"policy/{hash_}/model.safetensors", 0) == 0
    assert list(store.list()) == []


def test_a_model_that_was_named_as_a_mark_is_a_model(url, tmp_path):
    """Such names are refused by now; what was published stays what it is."""
    done = publish(url, tmp_path, 1, name="publishing")
    found = list_versions(url)
    assert [(v.name, v.content_hash, v.complete) for v in found] == [
        ("publishing", done.content_hash, True)
    ]
    assert retain(url, keep=1, grace_hours=0).removed == []


def test_a_publisher_waits_for_the_clean_up(url, tmp_path):
    """The clean-up removes the very version that is published again."""
    store = open_store(url)
    first = publish(url, tmp_path, 1)
    publish(url, tmp_path, 2)
    began = threading.Event()
    done = []

    def again():
        began.set()
        done.append(publish(url, tmp_path, 1))

    with being_retired(store, "policy", first.content_hash) as now:
        assert now is not None
        thread = threading.Thread(target=again)
        thread.start()
        began.wait()
        time.sleep(0.5)
        assert not done
        for key in list(store.list(f"policy/{first.content_hash}/")):
            store.delete(key)
    thread.join(60)
    assert done[0].bytes_moved == 1010
    check_store(url, [first])


def test_the_mark_of_a_killed_clean_up_ends(url, tmp_path, monkeypatch):
    store = open_store(url)
    hash_ = publish(url, tmp_path, 1).content_hash
    publish(url, tmp_path, 2)
    store.write(f"policy/retiring/{hash_}.json", b"{}")
    monkeypatch.setattr(lease, "RETIRING_SECONDS", 0.5)
    with pytest.raises(WriteConflict, match="dpo retain is removing"):
        publish(url, tmp_path, 1, deadline_seconds=0.1)
    time.sleep(2)
    assert publish(url, tmp_path, 1).bytes_moved == 0


def test_retention_and_publishers_at_once(url, tmp_path):
    """Ever the same three models by turns, while the clean-up keeps one: nothing dangles."""
    for seed in (1, 2, 3):
        publish(url, tmp_path, seed)
    stop = threading.Event()
    problems = []

    def clean():
        while not stop.is_set():
            try:
                retain(url, keep=1, grace_hours=0)
            except Exception as error:
                problems.append(error)

    thread = threading.Thread(target=clean)
    thread.start()
    try:
        for turn in range(6):
            done = publish(url, tmp_path, turn % 3 + 1)
            check_store(url, [done])
    finally:
        stop.set()
        thread.join()
    assert problems == []


def test_the_mark_of_a_publisher_who_waits_for_the_clean_up_stays(tmp_path, monkeypatch):
    """Without it the next clean-up would remove the version while it is written again."""
    url = f"file://{tmp_path}/store"
    first, _ = publish(url, tmp_path, 1), publish(url, tmp_path, 2)
    mark = f"policy/{lease.PUBLISHING}/{first.content_hash}/waits.json"
    store = open_store(url)

    def comes_now(*given):
        if store.stat(f"policy/{lease.RETIRING}/{first.content_hash}.json"):
            # the clean-up has seen nobody, and asks what is published
            store.write(mark, lease._mark(["model.safetensors"], 600.0))
        return read_latest(*given)

    monkeypatch.setattr(versions, "read_latest", comes_now)
    assert [version.content_hash for version in retain(url, keep=1).removed] == [first.content_hash]
    assert store.stat(mark) is not None


def test_many_publishers_of_one_name(url, tmp_path):
    """Each wins once: nobody's version is lost from the history."""
    count = 5
    results = [None] * count

    def work(seed):
        results[seed] = publish(url, tmp_path, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latest = check_store(url, results)
    everything = {latest.content_hash, *latest.previous}
    assert everything == {published.content_hash for published in results}


@pytest.mark.minio
@pytest.mark.parametrize("ignored", [("",), ("other",), ("", "other")])
def test_a_store_without_conditional_writes_is_refused(bucket_url, tmp_path, monkeypatch, ignored):
    """The server answers as one that does not know one of the two headers, or neither."""
    from dpo.storage.s3 import S3Store

    url = f"{bucket_url}/team"
    open_store(url).check(create=True)
    first = publish(url, tmp_path, 1)
    known = S3Store._condition

    def condition(self, expected):
        kind = "" if expected == "" else "other"
        return {} if kind in ignored else known(self, expected)

    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "_condition", condition)
        with pytest.raises(StoreError, match=r"(?s)no conditional writes.*MinIO of 2025 or newer"):
            publish(url, tmp_path, 2)
        # what a run begins with: not after hours of training
        with pytest.raises(StoreError, match="no conditional writes"):
            record_plan({"publish_store": url}, "run", {})
    check_store(url, [first])
    assert read_run_manifest(url, "run")["state"] == "running"
    record_plan({"publish_store": url}, "run", {})


def test_what_cannot_be_read_is_told_and_nothing_is_removed_for_it(url, tmp_path, capsys):
    """A damaged manifest counts for none; of a damaged ``latest.json`` all versions stay."""
    one, two, three = (publish(url, tmp_path, seed) for seed in (1, 2, 3))
    others = [publish(url, tmp_path, seed, name="other") for seed in (4, 5)]
    store = open_store(url)
    store.write(f"policy/{two.content_hash}/manifest.json", b"{")
    store.write("other/latest.json", b"{")
    store.write(f"other/{'a' * 64}/half", b"half")
    bad = {store.url(f"policy/{two.content_hash}/manifest.json"), store.url("other/latest.json")}
    assert main(["list", url]) == 1
    said = capsys.readouterr().out.splitlines()
    assert {line.split()[2] for line in said if line.startswith("not known")} == bad
    assert sum(one.content_hash in line for line in said) == 1
    assert main(["list", url, "format=json"]) == 1
    result = retain(url, keep=2, grace_hours=0)
    assert (result.removed, set(result.unread)) == ([], bad)
    assert store.read(f"other/{'a' * 64}/half") == b"half"
    capsys.readouterr()
    assert main(["retain", url, "keep=1"]) == 1
    assert f"removed policy {one.content_hash}" in capsys.readouterr().out
    left = {version.content_hash for version in list_versions(url)}
    assert left == {h.content_hash for h in (two, three, *others)} | {"a" * 64}


def test_a_rollback_passes_over_what_is_damaged(url, tmp_path):
    one, two, _ = (publish(url, tmp_path, seed) for seed in (1, 2, 3))
    store = open_store(url)
    store.write(f"policy/{two.content_hash}/manifest.json", b"{")
    assert rollback(store, "policy") == one.content_hash


@pytest.mark.parametrize("key", ["blob", "manifest.json"])
def test_folders_of_others_are_left(url, tmp_path, key):
    """A store of blobs by their hashes, in the same bucket."""
    publish(url, tmp_path, 1)
    store = open_store(url)
    for digit in "abc":
        store.write(f"cas/{digit * 64}/{key}", b'{"format_version": 1}')
        store.write(f"cas/{digit * 64}.json", b"{}")
    assert retain(url, keep=1, grace_hours=0).removed == []
    assert len(list(store.list("cas/"))) == 6


@pytest.mark.parametrize("by", ["", "policy/"])
def test_a_link_to_a_version_hides_it_from_nobody(tmp_path, by):
    """Whichever of link and folder is met first; a publisher of the version had been killed."""
    url = f"file://{tmp_path}/store"
    done = [publish(url, tmp_path, seed) for seed in (1, 2)]
    for number in range(20):
        link = tmp_path / f"store/{by}stable-{number}"
        link.symlink_to(tmp_path / f"store/policy/{done[number % 2].content_hash}")
    mark = f"policy/publishing/{done[0].content_hash}/killed.json"
    open_store(url).write(mark, json.dumps({"files": [], "seconds": 0}).encode())
    time.sleep(1.1)
    found = list_versions(url)
    assert [(v.content_hash, v.complete) for v in found] == [
        (done[1].content_hash, True),
        (done[0].content_hash, True),
    ]
    assert retain(url, keep=2, grace_hours=0).removed == []
    check_store(url, [done[1]])
    assert rollback(open_store(url), "policy") == done[0].content_hash
    check_store(url, [done[0]])


def test_a_mark_that_cannot_be_read_may_be_a_publishers(url, tmp_path):
    store = open_store(url)
    done = [publish(url, tmp_path, seed) for seed in (1, 2)]
    store.write(f"policy/publishing/{done[0].content_hash}/x.json", b"{")
    assert hashes(retain(url, keep=1).busy) == [done[0].content_hash]


@pytest.mark.parametrize("needed", [1, 3])
def test_a_full_disk_is_cleaned_up(url, tmp_path, monkeypatch, needed):
    """Nothing can be written until some files are gone, the clean-up's mark neither."""
    one, two = (publish(url, tmp_path, seed) for seed in (1, 2))
    store = type(open_store(url))
    write, delete, gone = store.write, store.delete, []

    def full(self, key, data, *, expected=None):
        if len(gone) < needed:
            raise StoreFull("no space left")
        write(self, key, data, expected=expected)

    def noted(self, key):
        delete(self, key)
        gone.append(key)

    monkeypatch.setattr(store, "write", full)
    monkeypatch.setattr(store, "delete", noted)
    assert hashes(retain(url, keep=1).removed) == [one.content_hash]
    assert gone[0] == f"policy/{one.content_hash}/manifest.json"
    assert hashes(list_versions(url)) == [two.content_hash]
    check_store(url, [two])
    gone.clear()
    # one that is being written has its mark, and what is young may get one
    for name in (f"policy/publishing/{'a' * 64}/x.json", f"policy/{'b' * 64}/half"):
        write(open_store(url), name, b'{"files": [], "seconds": 60}')
    assert sorted(hashes(retain(url, keep=1).busy)) == ["a" * 64, "b" * 64]
    assert gone == []


def test_who_is_always_too_late_says_so(url, tmp_path, monkeypatch):
    first, second = publish(url, tmp_path, 1), publish(url, tmp_path, 2)
    store = open_store(url)

    def conflict(*_, **__):
        raise WriteConflict("another writer was first")

    monkeypatch.setattr(store, "write", conflict)
    with pytest.raises(WriteConflict, match="faster each time"):
        point_latest(store, "policy", first.content_hash)
    check_store(url, [second])


def test_the_history_is_bounded(monkeypatch):
    monkeypatch.setattr(version, "_REMEMBERED", 2)
    now = version.Latest("c", ("b", "a"))
    assert version._previous(now, "d", back=False) == ["c", "b"]
