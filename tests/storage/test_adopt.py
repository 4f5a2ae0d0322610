"""Earlier artifacts as a beginning: verified, and refused when they are not what they should be."""

import json

import pytest

from dpo.errors import ArtifactError, ConfigError
from dpo.storage.adopt import adopt, read_artifact
from dpo.storage.manifest import content_hash, read_manifest, sha256_file, write_manifest


@pytest.fixture
def artifact(tmp_path):
    """Output of a step in a folder of its own."""

    def make(stage, name="artifact", inputs=None, **files):
        folder = tmp_path / name
        (folder / "part").mkdir(parents=True)
        for file, text in (files or {"a.txt": "one"}).items():
            (folder / file).write_text(text)
        (folder / "part" / "b.txt").write_text(f"two of {name}")
        write_manifest(folder, stage, inputs=inputs, settings={"seed": 3}, code="c" * 8)
        return folder

    return make


@pytest.mark.parametrize("as_url", [True, False])
def test_an_output_becomes_that_of_the_step_with_the_same_content(artifact, tmp_path, as_url):
    folder = artifact("sft", inputs={"pairs": "p" * 64})
    before = read_manifest(folder)
    uri = folder.as_uri() if as_url else str(folder)
    adopt(uri, tmp_path / "out", "sft", expected=before.content_hash)
    after = read_manifest(tmp_path / "out", stage="sft")
    assert after.content_hash == before.content_hash
    assert after.inputs == before.inputs
    assert after.settings == {"seed": 3}
    assert after.details["adopted_from"] == uri
    assert (tmp_path / "out/part/b.txt").read_text() == "two of artifact"


def test_a_published_model_is_found_by_its_name_and_becomes_an_sft_model(tmp_path):
    files = [{"path": "model.bin", "size": 5, "sha256": ""}]
    draft = tmp_path / "draft"
    draft.write_text("bytes")
    files[0]["sha256"] = sha256_file(draft)
    version = content_hash({"model.bin": files[0]["sha256"]})
    folder = tmp_path / "store/policy" / version
    folder.mkdir(parents=True)
    (folder / "model.bin").write_text("bytes")
    manifest = {"format_version": 1, "name": "policy", "content_hash": version, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    latest = {"format_version": 1, "content_hash": version}
    (folder.parent / "latest.json").write_text(json.dumps(latest))
    name = (tmp_path / "store/policy").as_uri()
    assert read_artifact(name, "sft").content_hash == version
    adopt(name, tmp_path / "out", "sft")
    assert read_manifest(tmp_path / "out", stage="sft").content_hash == version
    with pytest.raises(ConfigError, match="cannot stand in for that of ingest"):
        read_artifact(name, "ingest")


def test_a_folder_that_is_named_by_a_hash_may_hold_a_steps_output(artifact):
    folder = artifact("sft", "f" * 64)
    assert read_artifact(str(folder), "sft").content_hash == read_manifest(folder).content_hash


def test_a_changed_byte_is_found(artifact, tmp_path):
    folder = artifact("ingest")
    (folder / "part/b.txt").write_text("TWO of artifact")
    with pytest.raises(ArtifactError, match=r"part/b\.txt of the artifact has other bytes"):
        adopt(str(folder), tmp_path / "out", "ingest")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_found(artifact, tmp_path):
    folder = artifact("ingest")
    (folder / "part/b.txt").unlink()
    with pytest.raises(ArtifactError, match=r"part/b\.txt of the artifact is missing"):
        adopt(str(folder), tmp_path / "out", "ingest")


def test_a_manifest_that_was_edited_is_found(artifact):
    folder = artifact("ingest")
    values = json.loads((folder / "manifest.json").read_text())
    values["files"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(str(folder), "ingest")


def test_a_manifest_cannot_write_outside_of_the_output(artifact, tmp_path):
    folder = artifact("ingest")
    values = json.loads((folder / "manifest.json").read_text())
    values["files"][0]["path"] = "../../escaped"
    entries = {entry["path"]: entry["sha256"] for entry in values["files"]}
    values["content_hash"] = content_hash(entries)
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(Exception, match="not a key of an object"):
        adopt(str(folder), tmp_path / "out", "ingest")
    assert not (tmp_path / "escaped").exists()


def test_an_artifact_that_changed_after_planning_is_refused(artifact, tmp_path):
    with pytest.raises(ConfigError, match="changed after the run was planned"):
        adopt(str(artifact("sft")), tmp_path / "out", "sft", expected="0" * 64)


def test_log_probs_of_other_pairs_are_refused(artifact, tmp_path):
    mine, other = artifact("ingest", "mine"), artifact("ingest", "other")
    made_from = {"pairs": read_manifest(other).content_hash}
    reference = artifact("reference", "reference", inputs=made_from)
    adopt(str(reference), tmp_path / "good", "reference", inputs={"pairs": other})
    with pytest.raises(ArtifactError, match="made from other pairs than this run has"):
        adopt(str(reference), tmp_path / "out", "reference", inputs={"pairs": mine})


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("org/name", "names no artifact"),
        ("runs/mine", "names no artifact"),
        ("https://host/artifact", "names no artifact"),
    ],
)
def test_what_names_no_artifact(uri, words):
    with pytest.raises(ConfigError, match=words):
        read_artifact(uri, "sft")


def test_a_folder_without_a_manifest(tmp_path):
    with pytest.raises(ArtifactError, match=r"manifest\.json is missing"):
        read_artifact(str(tmp_path), "sft")


def test_an_output_of_another_step(artifact):
    with pytest.raises(ConfigError, match="an output of step ingest cannot stand in for that of"):
        read_artifact(str(artifact("ingest")), "sft")
