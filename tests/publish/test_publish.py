"""Publishing to a folder and to a real MinIO server; reading back; refusing what does not fit."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from io import BytesIO

import pytest
from minio import Minio

from dpo.cli import main
from dpo.config.compose import compose
from dpo.config.places import builtin
from dpo.config.stages import restrict
from dpo.errors import ArtifactError, ConfigError, ObjectMissing, StoreError
from dpo.publish.runs import record_verdict
from dpo.publish.stage import run_publish
from dpo.publish.verify import pull, verify
from dpo.storage.manifest import content_hash, read_manifest, staged, write_manifest
from dpo.storage.runs import read_run_manifest
from dpo.storage.store import open_store
from tests.publish.pipeline import output


@pytest.fixture
def run(tmp_path):
    """Outputs of preference, evaluate and gate that belong together, around the tiny model."""
    folder = tmp_path / "policy"
    with staged(folder) as partial:
        shutil.copytree(builtin("builtin:tiny"), partial, dirs_exist_ok=True)
        settings = {"loss": {"name": "dpo", "beta": 0.1}, "optimizer": "AdamW", "lr": 1e-5}
        record = {"config": settings, "examples": 8, "steps": 2, "data_fingerprint": "d"}
        (partial / "run.json").write_text(json.dumps(record), encoding="utf-8")
        (partial / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        write_manifest(partial, "preference")
    policy = read_manifest(folder).content_hash
    figures = {"evaluation.json": {"n_pairs": 1}}
    judged = output(tmp_path / "evaluation", "evaluate", figures, inputs={"policy": policy})
    output(
        tmp_path / "verdict",
        "gate",
        {"verdict.json": {"approved": True}},
        inputs={"evaluation": judged.content_hash},
        details={"approved": True},
    )
    return tmp_path


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.minio)])
def url(request, tmp_path):
    if request.param == "folder":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue('bucket_url')}/team"


def publish(run, url, out="published", run_id="run-1", **settings):
    overrides = [f"publish.store='{url}'", "publish.create_bucket=true", "model=tiny"]
    overrides += [f"publish.{key}={value}" for key, value in settings.items()]
    config = restrict(compose(overrides).config, "publish")
    run_publish(
        config,
        run / out,
        policy=run / "policy",
        evaluation=run / "evaluation",
        verdict=run / "verdict",
        run_id=run_id,
    )
    return json.loads((run / out / "published.json").read_text())


def test_what_is_published_is_whole_and_latest_names_it(run, url):
    published = publish(run, url)
    store = open_store(url)
    assert json.loads(store.read("policy/latest.json"))["content_hash"] == published["content_hash"]
    manifest = verify(f"{url}/policy")
    assert manifest == verify(published["url"])
    names = {entry["path"] for entry in manifest["files"]}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"run.json", "metrics.jsonl", "manifest.json"} & names


def test_without_a_run_the_model_alone_is_published(run, url):
    published = publish(run, url, run_id="")
    assert verify(published["url"])["run_id"] == ""
    assert list(open_store(url).list("runs")) == []


def test_a_run_id_that_is_none_publishes_nothing(run, url):
    with pytest.raises(ConfigError, match="is not a run id"):
        publish(run, url, run_id="../other")
    assert not (run / "store" / "policy").exists()


def test_unchanged_content_moves_no_bytes_and_says_so(run, url):
    first = publish(run, url)
    second = publish(run, url, out="again", run_id="run-2")
    assert (second["unchanged"], second["bytes_moved"]) == (True, 0)
    assert second["content_hash"] == first["content_hash"]
    assert not first["unchanged"]
    assert first["bytes_moved"] > 0


def test_the_manifest_of_the_run_tells_what_was_published(run, url):
    published = publish(run, url, run_id="run-7")
    assert read_run_manifest(url, "run-7")["published"]["url"] == published["url"]


def gate(run, url, run_id):
    """What the gate writes before a run is published."""
    overrides = [f"publish.store='{url}'", "publish.create_bucket=true"]
    config = restrict(compose(overrides).config, "gate")
    record_verdict(config.publish, run_id, evaluation=run / "evaluation", verdict=run / "verdict")


@pytest.mark.filterwarnings("ignore::Warning")
def test_a_run_that_the_registry_fails_has_failed(run, url):
    for _ in range(2):
        gate(run, url, "run-1")
        with pytest.raises(StoreError, match="the model is published, but the registry"):
            publish(run, url, registry="http://127.0.0.1:9")
        found = read_run_manifest(url, "run-1")
        assert (found["state"], bool(found["ended"])) == ("failed", True)
        assert "the model is published, but the registry" in found["reason"]
        assert found["published"]["name"] == "policy"
    publish(run, url)
    found = read_run_manifest(url, "run-1")
    assert (found["state"], found["reason"]) == ("succeeded", None)


def test_a_run_that_the_store_fails_has_failed(run, url, monkeypatch):
    """Where the store does not take that either, its own problem is told."""
    gate(run, url, "run-1")
    assert read_run_manifest(url, "run-1")["state"] == "running"
    store = type(open_store(url))

    def fail(*_, **__):
        raise StoreError("the store is gone")

    for patched, state in (("write", "running"), ("upload", "failed")):
        with monkeypatch.context() as patch:
            patch.setattr(store, patched, fail)
            with pytest.raises(StoreError, match="the store is gone"):
                publish(run, url)
        found = read_run_manifest(url, "run-1")
        assert found["state"] == state
    assert found["reason"] == "the store is gone"


def test_verdict_and_report_are_kept_of_a_refused_run_too(run, url):
    gate(run, url, "run-9")
    found = read_run_manifest(url, "run-9")
    assert found["verdict"] == {"approved": True}
    assert "published" not in found


def test_a_pulled_model_is_that_which_was_published(run, url):
    publish(run, url)
    pull(f"{url}/policy", run / "pulled")
    expected = (run / "policy/model.safetensors").read_bytes()
    assert (run / "pulled/model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_damage_is_found_and_named(run, url, damage):
    published = publish(run, url)
    store = open_store(url)
    key = f"policy/{published['content_hash']}/config.json"
    content = store.read(key)
    if damage == "remove":
        store.delete(key)
    else:
        store.write(key, content[:-1] + (b"" if damage == "cut" else b" "))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        verify(f"{url}/policy")
    again = publish(run, url, out="again")
    assert again["bytes_moved"] == len(content)
    verify(f"{url}/policy")


def test_a_file_that_is_none_of_the_versions_is_named(run, url):
    """Servers read a folder as it is: more weights in it would be loaded."""
    published = publish(run, url)
    key = f"policy/{published['content_hash']}/more.safetensors"
    open_store(url).write(key, b"x")
    for address in (f"{url}/policy", published["url"]):
        with pytest.raises(ArtifactError, match=r"more\.safetensors is there and is no file of"):
            verify(address)
    pull(f"{url}/policy", run / "pulled")
    assert not (run / "pulled/more.safetensors").exists()


@pytest.mark.minio
def test_the_mark_of_a_folder_is_no_file(run, bucket_url, minio_environment):
    """As consoles make folders."""
    published = publish(run, bucket_url)
    at = minio_environment.endpoint.removeprefix("http://")
    keys = (minio_environment.access_key, minio_environment.secret_key)
    client, bucket = Minio(at, *keys, secure=False), bucket_url.removeprefix("s3://")
    folders = (f"policy/{published['content_hash']}/", "policy/", "runs/", "communities/acme/data/")
    for key in folders:
        client.put_object(bucket, key, BytesIO(), 0)
    assert verify(f"{bucket_url}/policy") == verify(published["url"])
    assert main(["list", bucket_url]) == 0
    assert main(["retain", bucket_url, "keep=1", "grace_hours=0"]) == 0
    assert main(["forget", bucket_url, "community=acme"]) == 0


def test_a_version_without_its_manifest_is_completed(run, url):
    """Its files are there; they are not sent again."""
    published = publish(run, url)
    store = open_store(url)
    store.delete(f"policy/{published['content_hash']}/manifest.json")
    store.delete(f"policy/{published['content_hash']}/config.json")
    again = publish(run, url, out="again")
    assert again["bytes_moved"] == (run / "policy/config.json").stat().st_size
    assert not again["unchanged"]
    verify(f"{url}/policy")


def test_nothing_is_published_here(url):
    open_store(url).check(create=True)
    with pytest.raises(ArtifactError, match="no published model"):
        verify(f"{url}/policy")


def test_pulling_into_a_used_folder_is_refused(run, url):
    publish(run, url)
    (run / "pulled").mkdir()
    (run / "pulled/mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        pull(f"{url}/policy", run / "pulled")
    assert [path.name for path in (run / "pulled").iterdir()] == ["mine.txt"]


def test_a_pull_that_was_killed_is_gone_on_with(run, url, monkeypatch):
    publish(run, url)
    target = run / "pulled"
    pull(f"{url}/policy", target)
    before = (target / "model.safetensors").stat().st_mtime_ns
    (target / "config.json").rename(target / ".config.json.0123456789ab.partial")
    pull(f"{url}/policy", target)
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert not list(target.glob(".*"))
    assert (target / "config.json").is_file()
    # another version's file of the same name is not written over
    (target / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json is not of this version"):
        pull(f"{url}/policy", target)
    assert (target / "config.json").read_text() == "{}"


def test_a_failure_takes_nothing_from_the_pull_before(run, url, monkeypatch):
    """It was killed near its end; the one that goes on loses the store."""
    publish(run, url)
    target = run / "pulled"
    pull(f"{url}/policy", target)
    whole = sorted(path.name for path in target.iterdir())
    (target / "tokenizer.json").unlink()
    (target / "config.json").unlink()
    store = type(open_store(url))
    download = store.download

    def fail_at_one(self, key, path, progress=None):
        if key.endswith("tokenizer.json"):
            raise StoreError("gone")
        download(self, key, path, progress)

    with monkeypatch.context() as patch:
        patch.setattr(store, "download", fail_at_one)
        with pytest.raises(StoreError, match="gone"):
            pull(f"{url}/policy", target)
    left = [name for name in whole if name not in ("tokenizer.json", "config.json")]
    assert sorted(path.name for path in target.iterdir()) == left
    pull(f"{url}/policy", target)
    assert sorted(path.name for path in target.iterdir()) == whole


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("problem", [KeyboardInterrupt, StoreError("gone")])
def test_a_pull_that_fails_leaves_nothing(run, url, monkeypatch, there, problem):
    publish(run, url)
    target = run / "a/pulled"
    if there:
        (target / "lost+found").mkdir(parents=True)
    store = type(open_store(url))
    download = store.download

    def fail_at_the_end(self, key, path, progress=None):
        if key.endswith("tokenizer.json"):
            raise problem
        download(self, key, path, progress)

    monkeypatch.setattr(store, "download", fail_at_the_end)
    with pytest.raises(type(problem) if isinstance(problem, Exception) else problem):
        pull(f"{url}/policy", target)
    assert [path.name for path in target.rglob("*")] == (["lost+found"] if there else [])
    assert target.exists() == there


def test_a_manifest_cannot_write_outside_the_target(tmp_path):
    store = open_store(f"file://{tmp_path}/store")
    entry = {"path": "../../escaped", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    version = content_hash({entry["path"]: entry["sha256"]})
    manifest = {"format_version": 2, "name": "policy", "content_hash": version, "files": [entry]}
    store.write(f"policy/{version}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(StoreError, match="escaped"):
        pull(f"{store.root}/policy/{version}", tmp_path / "a/b/pulled")
    assert not (tmp_path / "a/escaped").exists()


def test_another_version_in_a_versions_place_is_refused(run, url):
    """Its own manifest and files fit together, but it is not what ``latest.json`` names."""
    published = publish(run, url)
    entry = {"path": "w", "size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    version = content_hash({"w": entry["sha256"]})
    manifest = {"format_version": 2, "name": "policy", "content_hash": version, "files": [entry]}
    store, place = open_store(url), f"policy/{published['content_hash']}"
    store.write(f"{place}/w", b"x")
    store.write(f"{place}/manifest.json", json.dumps(manifest).encode())
    for address in (f"{url}/policy", published["url"]):
        with pytest.raises(ArtifactError, match=f"another version, {version[:12]}, in the place"):
            verify(address)
        with pytest.raises(ArtifactError, match="another version"):
            pull(address, run / "pulled")
    assert not (run / "pulled").exists()
    # publishing again puts the right manifest there; its files were there all along
    assert publish(run, url, out="again")["bytes_moved"] == 0
    with pytest.raises(ArtifactError, match="w is there and is no file of this version"):
        verify(f"{url}/policy")
    store.delete(f"{place}/w")
    assert verify(f"{url}/policy")["content_hash"] == published["content_hash"]


def test_a_manifest_that_is_not_of_its_files_is_not_pulled(tmp_path):
    store = open_store(f"file://{tmp_path}/store")
    manifest = {"format_version": 2, "name": "policy", "content_hash": "a" * 64, "files": []}
    store.write(f"policy/{'a' * 64}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(ArtifactError, match="not that of its files"):
        pull(f"{store.root}/policy/{'a' * 64}", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.fixture
def small_disk(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip(f"cannot mount a small disk: run as root: {' '.join(mount)}")
    yield small
    subprocess.run(["umount", str(small)], check=True)


def test_a_full_disk_is_the_readers_and_is_named(run, url, small_disk, monkeypatch, capsys):
    publish(run, url)
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    for command in (["verify"], ["pull", f"output={small_disk / 'pulled'}"]):
        assert main([command[0], f"{url}/policy", *command[1:]]) == 1
        said = capsys.readouterr().err
        assert "the disk is full" in said
        assert f"where: {small_disk}" in said
        shutil.rmtree(small_disk / "pulled", ignore_errors=True)
    (small_disk / "filler").write_bytes(bytes(8192))
    inputs = [f"{name}={run / name}" for name in ("policy", "evaluation", "verdict")]
    settings = ["model=tiny", f"publish.store={url}", f"output={run / 'again'}"]
    assert main(["publish", *inputs, *settings]) == 1
    assert f"where: {small_disk}" in capsys.readouterr().err


def mismatch(run, name, stage, **manifest):
    shutil.rmtree(run / name)
    output(run / name, stage, {f"{name}.json": {}}, **manifest)


def test_an_evaluation_of_another_policy_is_refused(run, url):
    mismatch(run, "evaluation", "evaluate", inputs={"policy": "another"})
    with pytest.raises(ArtifactError, match="another policy"):
        publish(run, url)


def test_a_verdict_on_another_evaluation_is_refused(run, url):
    mismatch(run, "verdict", "gate", inputs={"evaluation": "another"}, details={"approved": True})
    with pytest.raises(ArtifactError, match="another evaluation"):
        publish(run, url)


def test_a_refused_policy_is_not_published(run, url):
    judged = read_manifest(run / "evaluation").content_hash
    mismatch(run, "verdict", "gate", inputs={"evaluation": judged}, details={"approved": False})
    with pytest.raises(ArtifactError, match="the gate refused"):
        publish(run, url)


def test_a_changed_checkpoint_is_not_published(run, url):
    weights = run / "policy/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        publish(run, url)


@pytest.mark.minio
def test_a_bucket_that_is_missing_is_not_made_unasked(run, bucket_url):
    with pytest.raises(ObjectMissing, match="create_bucket"):
        publish(run, bucket_url, create_bucket="false")
