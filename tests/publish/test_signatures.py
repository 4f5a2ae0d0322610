"""Signatures of manifests and of ``latest.json``: what no trusted key signed is refused."""

import json
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from dpo.cli import main
from dpo.errors import ArtifactError, ConfigError
from dpo.publish import version
from dpo.publish.lineage import chain
from dpo.publish.signing import check
from dpo.publish.verify import pull, verify
from dpo.publish.version import publish_files
from dpo.storage.adopt import adopt, read_artifact
from dpo.storage.store import open_store
from tests.publish.conftest import make_folder
from tests.publish.pipeline import source


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two key pairs made by openssl, as the documentation says: (private, public) each."""
    folder = tmp_path_factory.mktemp("keys")
    made = []
    for number in range(2):
        path = folder / f"{number}.pem"
        openssl("genpkey", "-algorithm", "ed25519", "-out", str(path))
        made.append((path.read_text(), openssl("pkey", "-in", str(path), "-pubout")))
    return made


def openssl(*arguments):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is needed to make keys: apt-get install openssl")
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_signed_model_is_verified_with_the_public_key(pipeline, keys, monkeypatch):
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    pipeline.run("run-1", source("pairs.jsonl"))
    monkeypatch.delenv("DPO_SIGNING_KEY")
    assert "was not checked" in verify(f"{pipeline.root}/policy")["signed"]
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[1][1] + keys[0][1])
    assert "which is trusted" in verify(f"{pipeline.root}/policy")["signed"]


def test_another_key_no_signature_and_a_changed_manifest_are_refused(
    pipeline, keys, monkeypatch, capsys
):
    published = pipeline.run("run-1", source("pairs.jsonl"))
    url = f"{pipeline.root}/policy"
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[1][1])
    with pytest.raises(ArtifactError, match="is not signed"):
        verify(url)
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    # publishing again signs what is there; no file moves
    assert pipeline.run("run-1", source("pairs.jsonl"))["bytes_moved"] == 0
    assert "which is trusted" in verify(url)["signed"]
    monkeypatch.delenv("DPO_SIGNING_KEY")
    with pytest.raises(ArtifactError, match="not trusted here"):
        verify(url)
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    store = open_store(pipeline.root)
    key = f"policy/{published['content_hash']}/manifest.json"
    manifest = json.loads(store.read(key))
    store.write(key, json.dumps({**manifest, "run_id": "another"}).encode())
    assert main(["verify", url]) == 1
    assert "signature is wrong" in capsys.readouterr().err


def test_what_latest_json_names_is_signed(pipeline, keys, monkeypatch, tmp_path, capsys):
    """Pointed elsewhere by hand, unsigned, or copied from another name: verify and pull refuse."""
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    first = pipeline.run("run-1", source("pairs.jsonl"))
    second = pipeline.run("run-2", source("others.jsonl"), weight=1)
    assert first["content_hash"] != second["content_hash"]
    monkeypatch.delenv("DPO_SIGNING_KEY")
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    store, url = open_store(pipeline.root), f"{pipeline.root}/policy"
    assert verify(url)["content_hash"] == second["content_hash"]
    text = store.read("policy/latest.json")
    latest = json.loads(text)
    # the older version is validly signed; that it is the latest is not
    forged = {**latest, "content_hash": first["content_hash"]}
    store.write("policy/latest.json", json.dumps(forged).encode())
    assert main(["verify", url]) == 1
    assert "latest.json's signature is wrong" in capsys.readouterr().err
    assert main(["pull", url, f"output={tmp_path / 'pulled'}"]) == 1
    assert "latest.json's signature is wrong" in capsys.readouterr().err
    assert not (tmp_path / "pulled").exists()
    del forged["signature"]
    store.write("policy/latest.json", json.dumps(forged).encode())
    with pytest.raises(ArtifactError, match=r"latest\.json is not signed"):
        verify(url)
    # one version, named in full, needs no latest.json
    assert verify(f"{url}/{first['content_hash']}")["content_hash"] == first["content_hash"]
    store.write("other/latest.json", text)
    with pytest.raises(ArtifactError, match="that of another model, policy"):
        verify(f"{pipeline.root}/other")


def test_a_signed_version_of_another_name_is_refused_in_this_ones_place(
    pipeline, keys, monkeypatch
):
    """Both are signed by the same key; whoever can write to the store puts one over the other."""
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    good = pipeline.run("run-1", source("pairs.jsonl"))
    elsewhere = f"{pipeline.root}/elsewhere"
    other = pipeline.run("run-2", source("others.jsonl"), weight=1, store=elsewhere)
    monkeypatch.delenv("DPO_SIGNING_KEY")
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    root, url = pipeline.folder / "store", f"{pipeline.root}/policy"
    theirs = root / "elsewhere/policy" / other["content_hash"]
    shutil.rmtree(root / "policy" / good["content_hash"])
    shutil.copytree(theirs, root / "policy" / good["content_hash"])
    for refused in (verify, chain, lambda url: pull(url, pipeline.folder / "pulled")):
        with pytest.raises(ArtifactError, match="another version"):
            refused(url)
    # nor does another name lend itself to it
    shutil.copytree(theirs, root / "safe" / other["content_hash"])
    with pytest.raises(ArtifactError, match="that of another model, policy"):
        verify(f"{pipeline.root}/safe/{other['content_hash']}")


def test_a_manifest_beside_latest_json_stands_for_nothing(pipeline, three, keys, monkeypatch):
    """Whoever can add objects copies an older version, validly signed, to the name's own folder."""
    (store, texts), url = three, f"{pipeline.root}/policy"
    monkeypatch.delenv("DPO_SIGNING_KEY")
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    first, third = (json.loads(texts[number])["content_hash"] for number in (0, 2))
    name = pipeline.folder / "store/policy"
    shutil.copytree(name / first, name, dirs_exist_ok=True)
    assert verify(url)["content_hash"] == third
    assert pull(url, pipeline.folder / "pulled")["content_hash"] == third
    assert chain(url)[0]["content_hash"] == third
    assert read_artifact(url, "sft").content_hash == third
    # nor where latest.json is removed as well
    store.delete("policy/latest.json")
    for read in (verify, chain, lambda url: read_artifact(url, "sft")):
        with pytest.raises(ArtifactError, match="no published model is here"):
            read(url)
    # an unsigned step's output is none either: of the versions and of this machine's memory, each
    # alone says that something is published here
    shutil.copytree(pipeline.folder / "run-0/sft", name, dirs_exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setenv("DPO_CACHE_DIR", str(pipeline.folder / "empty"))
        with pytest.raises(ArtifactError, match="no published model is here"):
            read_artifact(url, "sft")
    for text in texts:
        shutil.rmtree(name / json.loads(text)["content_hash"])
    with pytest.raises(ArtifactError, match="no published model is here"):
        read_artifact(url, "sft")
    monkeypatch.delenv("DPO_TRUSTED_KEYS")
    assert read_artifact(url, "sft").stage == "sft"


def test_a_copy_of_a_version_alone_has_its_name_where_keys_are_trusted(
    pipeline, three, keys, monkeypatch
):
    first = json.loads(three[1][0])["content_hash"]
    monkeypatch.delenv("DPO_SIGNING_KEY")
    root = pipeline.folder / "store"
    for name in ("copies/policy", "safe"):
        shutil.copytree(root / "policy" / first, root / name)
        assert verify(f"{pipeline.root}/{name}")["content_hash"] == first
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    assert verify(f"{pipeline.root}/copies/policy")["content_hash"] == first
    with pytest.raises(ArtifactError, match="that of another model, policy"):
        verify(f"{pipeline.root}/safe")


def test_the_lineage_of_an_unsigned_version_is_refused(pipeline, keys, monkeypatch):
    made = pipeline.run("run-1", source("pairs.jsonl"))
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    with pytest.raises(ArtifactError, match="the manifest is not signed"):
        chain(made["url"])


@pytest.mark.parametrize("signature", [None, "x", {"key_id": 5}, {"algorithm": "ed25519"}])
def test_a_signature_that_is_none_is_no_signature(signature, keys, monkeypatch):
    values = {"name": "policy", "signature": signature}
    assert check(values, "here") == "not signed"
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    with pytest.raises(ArtifactError, match="is not signed"):
        check(values, "here")


def test_rollback_signs_and_publishing_again_signs_what_was_not(
    pipeline, keys, monkeypatch, capsys
):
    first = pipeline.run("run-1", source("pairs.jsonl"))
    pipeline.run("run-2", source("others.jsonl"), weight=1)
    url = f"{pipeline.root}/policy"
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    assert pipeline.run("run-2", source("others.jsonl"), weight=1)["bytes_moved"] == 0
    assert "which is trusted" in verify(url)["signed"]
    # the version before was published without the key
    assert main(["publish", "--rollback", url]) == 0
    with pytest.raises(ArtifactError, match="the manifest is not signed"):
        verify(url)
    assert pipeline.run("run-1", source("pairs.jsonl"))["bytes_moved"] == 0
    assert verify(url)["content_hash"] == first["content_hash"]
    monkeypatch.delenv("DPO_SIGNING_KEY")
    capsys.readouterr()
    pipeline.run("run-2", source("others.jsonl"), weight=1)
    assert "latest.json was signed and is no more" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["planted-secret", "-----BEGIN PRIVATE KEY-----\nx\n-----END"])
def test_a_key_that_is_none_is_refused(pipeline, monkeypatch, key):
    monkeypatch.setenv("DPO_SIGNING_KEY", key)
    with pytest.raises(ConfigError, match="DPO_SIGNING_KEY is not an Ed25519") as caught:
        pipeline.run("run-1", source("pairs.jsonl"))
    assert "planted" not in str(caught.value)


def test_a_key_on_one_line_is_read(pipeline, keys, monkeypatch):
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0].replace("\n", "\\n"))
    pipeline.run("run-1", source("pairs.jsonl"))
    assert "which is trusted" in verify(f"{pipeline.root}/policy")["signed"]


@pytest.fixture
def three(pipeline, keys, monkeypatch):
    """Three signed versions; the store, and each ``latest.json`` in turn."""
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    store, texts = open_store(pipeline.root), []
    for number in range(3):
        pipeline.run(f"run-{number}", source(f"{number}.jsonl"), weight=number)
        texts.append(store.read("policy/latest.json"))
    return store, texts


def test_an_older_latest_json_is_refused(pipeline, three, tmp_path, capsys):
    """Each was signed by the right key, once; whoever can write to the store puts it back."""
    (store, texts), url = three, f"{pipeline.root}/policy"
    store.write("policy/latest.json", texts[0])
    for read in (verify, chain, lambda url: pull(url, tmp_path / "out")):
        with pytest.raises(ArtifactError, match=r"latest\.json is older than version [0-9a-f]{12}"):
            read(url)
    assert not (tmp_path / "out").exists()
    # the version after it may be one whose publisher was killed before it was named
    store.write("policy/latest.json", texts[1])
    capsys.readouterr()
    verify(url)
    assert "an older latest.json was put back" in capsys.readouterr().err
    store.write("policy/latest.json", texts[2])
    verify(url)
    assert "put back" not in capsys.readouterr().err
    # and this machine has seen the newest now
    store.write("policy/latest.json", texts[1])
    with pytest.raises(ArtifactError, match="than the one that this machine read before") as caught:
        verify(url)
    assert "this address leads to another store by now, or somebody put" in caught.value.found
    assert caught.value.fix.startswith("for another store (a port-forward) remove ")
    # what the message advises
    assert "--rollback" in caught.value.fix
    second = json.loads(texts[1])["content_hash"]
    assert main(["publish", "--rollback", url, f"version={second}"]) == 0
    capsys.readouterr()
    assert verify(url)["content_hash"] == second
    assert "put back" not in capsys.readouterr().err


def test_readers_and_publishers_at_once_take_nothing_for_put_back(keys, monkeypatch, tmp_path):
    """Files alone, of no run; every reader remembers what it saw, in one file."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    url, stop, problems = f"file://{tmp_path}/store", threading.Event(), []
    models = [(tmp_path / str(n), make_folder(tmp_path / str(n), n, sizes=(10,))) for n in (1, 2)]

    def publish(number):
        publish_files(open_store(url), *models[number % 2], "policy")

    def read():
        while not stop.is_set():
            try:
                verify(f"{url}/policy")
            except ArtifactError as error:
                problems.append(error)

    publish(0)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(1, 30):
            publish(number)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert problems == []


def test_a_rollback_is_no_older_latest_json(pipeline, three, capsys):
    url = f"{pipeline.root}/policy"
    verify(url)
    assert main(["publish", "--rollback", url]) == 0
    verify(url)
    pipeline.run("run-0", source("0.jsonl"), weight=0)
    verify(url)
    assert "put back" not in capsys.readouterr().err


def test_a_damaged_latest_json_that_was_removed_is_made_anew(pipeline, three):
    store, texts = three
    url = f"{pipeline.root}/policy"
    verify(url)
    store.delete("policy/latest.json")
    pipeline.run("run-2", source("2.jsonl"), weight=2)
    assert verify(url)["content_hash"] == json.loads(texts[2])["content_hash"]


@pytest.fixture
def clock_ahead(monkeypatch):
    """Sets the publishers' clock: seconds before the right time."""

    def ahead(seconds):
        values = {"time": lambda: time.time() + seconds, "monotonic": time.monotonic}
        monkeypatch.setattr(version, "time", SimpleNamespace(**values))

    return ahead


@pytest.mark.parametrize("how", ["publish", "rollback"])
def test_a_new_latest_json_is_above_all_that_went_before(
    keys, monkeypatch, tmp_path, clock_ahead, how
):
    """A publisher's clock was ahead by a day; then ``latest.json`` was removed, or put back."""
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DPO_SIGNING_KEY", keys[0][0])
    store, texts = open_store(f"file://{tmp_path}/store"), []
    clock_ahead(86400)
    for number in range(3):
        folder = tmp_path / str(number)
        publish_files(store, folder, make_folder(folder, number, sizes=(10,)), "policy")
        texts.append(store.read("policy/latest.json"))
        time.sleep(0.01)
    clock_ahead(0)
    if how == "publish":
        store.delete("policy/latest.json")
        publish_files(store, tmp_path / "1", make_folder(tmp_path / "1", 1, sizes=(10,)), "policy")
    else:
        store.write("policy/latest.json", texts[0])
        version.rollback(store, "policy", json.loads(texts[1])["content_hash"])
    expected = json.loads(texts[1])["content_hash"]
    assert verify(f"{store.root}/policy")["content_hash"] == expected


def test_a_step_that_starts_from_a_published_model_checks_its_signatures(
    pipeline, three, keys, monkeypatch
):
    (store, texts), url = three, f"{pipeline.root}/policy"
    monkeypatch.delenv("DPO_SIGNING_KEY")
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[0][1])
    first, third = (json.loads(texts[number])["content_hash"] for number in (0, 2))
    adopt(url, pipeline.folder / "adopted", "sft", expected=third)
    forged = {**json.loads(texts[2]), "content_hash": first}
    store.write("policy/latest.json", json.dumps(forged).encode())
    with pytest.raises(ArtifactError, match=r"latest\.json's signature is wrong"):
        adopt(url, pipeline.folder / "forged", "sft")
    assert read_artifact(f"{url}/{first}", "sft").content_hash == first
    # an unsigned step's output in the place of a signed version
    store.delete(f"policy/{first}/manifest.json")
    shutil.copytree(
        pipeline.folder / "run-0/sft", pipeline.folder / "store/policy" / first, dirs_exist_ok=True
    )
    with pytest.raises(ArtifactError, match="no published model is here"):
        read_artifact(f"{url}/{first}", "sft")
    monkeypatch.setenv("DPO_TRUSTED_KEYS", keys[1][1])
    with pytest.raises(ArtifactError, match="not trusted here"):
        read_artifact(f"{url}/{third}", "sft")
