"""Manifests of every format that there was are read. ``versions/<n>/`` has what format n wrote."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from dpo.errors import ArtifactError
from dpo.publish.lineage import chain, dependents
from dpo.publish.verify import pull, verify
from dpo.publish.version import publish_files, rollback
from dpo.publish.versions import list_versions
from dpo.storage.manifest import FORMAT_VERSION, content_hash, read_manifest
from dpo.storage.published import LATEST_FORMAT, VERSION_FORMAT, read_latest, read_version
from dpo.storage.runs import FORMAT_VERSION as RUN_FORMAT
from dpo.storage.runs import read_run_manifest
from dpo.storage.store import open_store
from tests.publish.conftest import make_folder

KEPT = Path(__file__).parent / "versions"
FORMATS = sorted(path.name for path in KEPT.iterdir())
PAIRS = "de20a5a1ff99e66ef31b634ae74e41eeffaad7604bb812670fb8a175338715aa"
POLICY = "af87fb3581375e0b837f2c931429b42ae20f35b854fee9d6912831729b54aa92"


@pytest.fixture(params=FORMATS)
def kept(request):
    return KEPT / request.param


def test_the_newest_formats_are_kept_too():
    newest = KEPT / FORMATS[-1]
    for name, version in {
        "step.json": FORMAT_VERSION,
        "version.json": VERSION_FORMAT,
        "latest.json": LATEST_FORMAT,
        "run.json": RUN_FORMAT,
    }.items():
        assert json.loads((newest / name).read_text())["format_version"] == version


def test_a_steps_manifest(kept, tmp_path):
    shutil.copy(kept / "step.json", tmp_path / "manifest.json")
    manifest = read_manifest(tmp_path, stage="preference", verify=False)
    assert manifest.content_hash == POLICY
    assert manifest.inputs == {"pairs": PAIRS}
    assert manifest.settings["loss"]["beta"] == 0.1
    assert len(manifest.files) == 6
    assert set(manifest.lineage) == (set() if kept.name == "1" else {PAIRS})


def test_a_runs_manifest(kept, tmp_path):
    folder = tmp_path / "runs" / "run-1"
    folder.mkdir(parents=True)
    shutil.copy(kept / "run.json", folder / "manifest.json")
    run = read_run_manifest(f"file://{tmp_path}", "run-1")
    assert run["verdict"] == {"approved": True}
    assert run["published"]["name"] == "policy"
    assert run["artifacts"]["preference"]["content_hash"] == POLICY
    assert run["artifacts"]["preference"]["parents"] == {"pairs": PAIRS}
    assert run["artifacts"]["evaluate"]["parents"] == {"policy": POLICY}
    for entry in run["artifacts"].values():
        assert {"step", "parents", "configuration", "code", "made_by"} <= set(entry)


def test_a_published_name(kept, tmp_path):
    latest = json.loads((kept / "latest.json").read_text())
    folder = tmp_path / "policy" / latest["content_hash"]
    folder.mkdir(parents=True)
    shutil.copy(kept / "latest.json", tmp_path / "policy")
    shutil.copy(kept / "version.json", folder / "manifest.json")
    store = open_store(f"file://{tmp_path}")
    assert read_latest(store, "policy").content_hash == latest["content_hash"]
    manifest = read_version(store, f"policy/{latest['content_hash']}")
    hashes = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    assert content_hash(hashes) == manifest["content_hash"] == latest["content_hash"]
    assert manifest["run_id"] == ("" if kept.name == "1" else "run-1")
    (listed,) = list_versions(f"file://{tmp_path}")
    assert (listed.latest, listed.complete) == (True, True)


def test_a_version_of_format_1_is_verified_pulled_replaced_and_gone_back_to(tmp_path):
    url, data = f"file://{tmp_path}/store", b"weights"
    digest = hashlib.sha256(data).hexdigest()
    version = content_hash({"model.safetensors": digest})
    store = open_store(url)
    store.write(f"policy/{version}/model.safetensors", data)
    entry = {"path": "model.safetensors", "size": len(data), "sha256": digest}
    old = {"format_version": 1, "name": "policy", "content_hash": version, "files": [entry]}
    store.write(f"policy/{version}/manifest.json", json.dumps(old).encode())
    latest = {"format_version": 1, "content_hash": version}
    store.write("policy/latest.json", json.dumps(latest).encode())
    assert verify(f"{url}/policy")["signed"] == "not signed"
    pull(f"{url}/policy", tmp_path / "pulled")
    assert (tmp_path / "pulled/model.safetensors").read_bytes() == data
    with pytest.raises(ArtifactError, match="before that was recorded"):
        chain(f"{url}/policy")
    files = make_folder(tmp_path / "next", 1, sizes=(10,))
    publish_files(store, tmp_path / "next", files, "policy")
    assert rollback(store, "policy") == version
    assert dependents(url, "acme").models == []


@pytest.mark.parametrize("what", ["latest.json", "version.json", "run.json", "step.json"])
def test_a_newer_format_is_refused_and_says_so(tmp_path, what):
    values = {**json.loads((KEPT / "1" / what).read_text()), "format_version": 99}
    hash_ = values.get("content_hash", "")
    store = open_store(f"file://{tmp_path}")
    places = {
        "latest.json": ("policy/latest.json", lambda: read_latest(store, "policy")),
        "version.json": (f"{hash_}/manifest.json", lambda: read_version(store, hash_)),
        "run.json": ("runs/r/manifest.json", lambda: read_run_manifest(store.root, "r")),
        "step.json": ("manifest.json", lambda: read_manifest(tmp_path)),
    }
    key, read = places[what]
    store.write(key, json.dumps(values).encode())
    with pytest.raises(ArtifactError, match=r"format 99; this version reads up to [234]"):
        read()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"format_version": "x"}'])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    store = open_store(f"file://{tmp_path}")
    store.write("policy/latest.json", text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_latest(store, "policy")


@pytest.mark.parametrize("hash_", ["../../etc", "", None, "A" * 64, 7])
def test_latest_cannot_lead_elsewhere(tmp_path, hash_):
    store = open_store(f"file://{tmp_path}")
    text = json.dumps({"format_version": 2, "content_hash": hash_})
    store.write("policy/latest.json", text.encode())
    with pytest.raises(ArtifactError, match="names no version"):
        read_latest(store, "policy")


_VERSION = {"format_version": 2, "name": "policy", "content_hash": "a" * 64, "files": []}
_ENTRY = {"path": "w", "size": 1, "sha256": "b" * 64}


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": ["w"]},
        {"files": [{"path": "w", "size": 1}]},
        {"files": [{**_ENTRY, "size": "1"}]},
        {"files": [_ENTRY, _ENTRY]},
        {"name": 5},
        {"content_hash": None},
        {"lineage": []},
        {"provenance": "x"},
    ],
)
def test_a_version_with_a_value_of_another_type_cannot_be_read(tmp_path, change):
    store = open_store(f"file://{tmp_path}")
    store.write("v/manifest.json", json.dumps({**_VERSION, **change}).encode())
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_version(store, "v")


@pytest.mark.parametrize("change", [{"previous": None}, {"previous": "a"}, {"name": 5}])
def test_latest_with_a_value_of_another_type_cannot_be_read(tmp_path, change):
    store = open_store(f"file://{tmp_path}")
    latest = {"format_version": 3, "content_hash": "a" * 64, **change}
    store.write("policy/latest.json", json.dumps(latest).encode())
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_latest(store, "policy")
