"""Manifests: written last, verified, and nothing without one counts as an output."""

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from dpo.errors import ArtifactError
from dpo.storage.manifest import (
    MANIFEST,
    check_place,
    content_hash,
    read_manifest,
    staged,
    write_atomically,
    write_manifest,
)
from dpo.storage.step import step


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    with staged(folder) as partial:
        (partial / "sub").mkdir()
        (partial / "a.txt").write_text("alpha")
        (partial / "sub" / "b.txt").write_text("beta")
        write_manifest(partial, "sft", settings={"seed": 1}, inputs={"pairs": "f00"}, code="c0de")
    return folder


def test_what_was_written_is_read_back(output):
    manifest = read_manifest(output, stage="sft")
    assert [(f.path, f.size) for f in manifest.files] == [("a.txt", 5), ("sub/b.txt", 4)]
    assert manifest.files[0].sha256 == hashlib.sha256(b"alpha").hexdigest()
    assert manifest.settings == {"seed": 1}
    assert manifest.inputs == {"pairs": "f00"}
    assert manifest.code == "c0de"


def test_the_content_hash_is_that_of_sorted_path_and_hash_lines(output):
    """By hand: sha256 of ``path NUL sha256 LF`` for each file in order of path."""
    a, b = hashlib.sha256(b"alpha").hexdigest(), hashlib.sha256(b"beta").hexdigest()
    expected = hashlib.sha256(f"a.txt\0{a}\nsub/b.txt\0{b}\n".encode()).hexdigest()
    assert read_manifest(output).content_hash == expected
    assert content_hash({"sub/b.txt": b, "a.txt": a}) == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.txt").unlink(), "a.txt of step sft is missing"),
        (lambda folder: (folder / "a.txt").write_text("alph"), "has 4 bytes, expected 5"),
        (lambda folder: (folder / "a.txt").write_text("alphA"), "sha256 differs"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "cannot be read"),
    ],
)
def test_damage_is_named(output, damage, message):
    damage(output)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_manifest(output)
    assert str(output) in str(caught.value)


def test_an_output_of_which_nothing_is_left_says_which_step_to_repeat(tmp_path, capsys):
    """Kubeflow's cache goes on to name what was removed from its bucket."""
    with pytest.raises(SystemExit), step("sft", "{}"):
        read_manifest(tmp_path / "gone", stage="ingest")
    said = capsys.readouterr().err
    assert "there is no such folder" in said
    assert "the output of step ingest; the backend's cache may name what was removed" in said
    assert "--rerun" in said


@pytest.mark.parametrize("stage", ["ingest", "checkpoint", None])
def test_a_folder_that_somebody_mistyped_is_no_matter_of_a_cache(tmp_path, stage):
    with pytest.raises(ArtifactError, match="there is no such folder") as caught:
        read_manifest(tmp_path / "gone", stage=stage)
    assert caught.value.fix == (
        f"name the output of step {stage}" if stage else "name the output of a step"
    )


def test_another_steps_output_is_refused(output):
    with pytest.raises(ArtifactError, match="expected the output of step ingest, found that of"):
        read_manifest(output, stage="ingest")


def test_a_newer_format_is_refused(output):
    raw = json.loads((output / MANIFEST).read_text())
    raw["format_version"] = 99
    (output / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="format 99; this version reads up to 2"):
        read_manifest(output)


def test_a_failed_step_leaves_nothing(tmp_path):
    def fail_half_way():
        with staged(tmp_path / "out") as partial:
            (partial / "half.txt").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Not what a process that lives is still writing, nor what another output is made of."""
    # two containers on one volume: each of their processes has the same number
    script = (
        "import os, sys, time, pathlib; from dpo.storage.manifest import staged\n"
        "os.getpid = lambda: 7\n"
        "with staged(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_text('half'); print(folder.name, flush=True)\n"
        "    time.sleep(600)"
    )
    begun, folders = [], []
    for name in ("model", "model", "model.v2"):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / name)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        folders.append(process.stdout.readline().decode().strip())
        begun.append(process)
    killed, lives, other = begun
    try:
        for process in (killed, other):
            process.kill()
            process.communicate()
        with staged(tmp_path / "model") as folder:
            write_manifest(folder, "sft")
        left = sorted(path.name for path in tmp_path.glob(".*"))
        assert left == sorted(folders[1:])
    finally:
        lives.kill()
        lives.communicate()


def test_what_was_to_be_replaced_is_put_back_as_itself_alone(tmp_path):
    """Its process was killed between two renames; another output's name is the start of its own."""
    with staged(tmp_path / "model.v2") as folder:
        write_manifest(folder, "sft")
    (tmp_path / "model.v2").rename(tmp_path / ".model.v2.0123456789ab.previous")
    with staged(tmp_path / "model") as folder:
        assert not (tmp_path / "model").exists()
        write_manifest(folder, "preference")
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "model.v2"):
        raise ZeroDivisionError
    assert read_manifest(tmp_path / "model.v2").stage == "sft"
    assert read_manifest(tmp_path / "model").stage == "preference"


def begin_and_fail(output):
    script = (
        "import sys, pathlib; from dpo.storage.manifest import staged\n"
        "with staged(pathlib.Path(sys.argv[1])): raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(output)], check=False).returncode == 3


@pytest.mark.parametrize("moment", ["mkdir", "rename"])
def test_another_that_begins_at_any_moment_leaves_what_this_one_makes(
    moment, tmp_path, monkeypatch
):
    """Right after the folder was made, and right before it becomes the output."""
    out, plain = tmp_path / "out", getattr(Path, moment)

    def with_another(path, *given, **options):
        if moment == "rename" and given == (out,):
            begin_and_fail(out)
        result = plain(path, *given, **options)
        if moment == "mkdir" and path.name.startswith(".out."):
            begin_and_fail(out)
        return result

    monkeypatch.setattr(Path, moment, with_another)
    with staged(out) as partial:
        (partial / "a.txt").write_text("alpha")
        write_manifest(partial, "sft")
    assert [file.path for file in read_manifest(out).files] == ["a.txt"]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_killed_while_it_replaces_an_output_leaves_one(renames, output):
    script = (
        "import os, sys; from pathlib import Path\n"
        "from dpo.storage.manifest import staged, write_manifest\n"
        "out, rename, left = Path(sys.argv[1]), Path.rename, [int(sys.argv[2])]\n"
        "def counted(path, target):\n"
        "    rename(path, target)\n"
        "    if out in (path, target): left[0] -= 1\n"
        "    if not left[0]: os._exit(9)\n"
        "Path.rename = counted\n"
        "with staged(out) as partial: write_manifest(partial, 'ingest')"
    )
    command = [sys.executable, "-c", script, str(output), str(renames)]
    assert subprocess.run(command, check=False).returncode == 9
    begin_and_fail(output)
    assert read_manifest(output).stage == ("sft" if renames == 1 else "ingest")
    assert list(output.parent.iterdir()) == [output]


def test_a_step_that_forgot_its_manifest_fails(tmp_path):
    with pytest.raises(ArtifactError, match="without writing its manifest"), staged(tmp_path / "o"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_complete_output_survives_a_failed_repetition(output):
    with pytest.raises(ZeroDivisionError), staged(output):
        raise ZeroDivisionError
    assert read_manifest(output).stage == "sft"


def test_a_complete_output_is_replaced_by_a_new_one(output):
    with staged(output) as partial:
        (partial / "c.txt").write_text("gamma")
        write_manifest(partial, "sft")
    assert [f.path for f in read_manifest(output).files] == ["c.txt"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_atomic_write_leaves_no_partial_file(tmp_path):
    write_atomically(tmp_path / "x.json", "1")
    write_atomically(tmp_path / "x.json", "2")
    assert (tmp_path / "x.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", ["thesis.txt", MANIFEST])
@pytest.mark.parametrize("begin", [staged, lambda folder: nullcontext(check_place(folder))])
def test_what_no_step_wrote_is_not_replaced(tmp_path, name, begin):
    """Seen: ``output=`` with a folder of the user's own removed all that lay in it.

    A web page has a manifest.json too.
    """
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text('{"name": "a page"}')
    with pytest.raises(ArtifactError, match="not written by a step") as found, begin(folder):
        pass
    assert found.value.where == str(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", name]
    with pytest.raises(ArtifactError, match="not written by a step"), begin(folder / name):
        pass


def test_an_empty_folder_becomes_the_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with staged(out) as partial:
        write_manifest(partial, "ingest")
    assert read_manifest(out).stage == "ingest"


def test_a_damaged_entry_of_a_cache_is_replaced(output):
    (output / MANIFEST).unlink()
    with staged(output, of_cache=True) as partial:
        write_manifest(partial, "tokens")
    assert read_manifest(output).stage == "tokens"
    assert [path.name for path in output.parent.iterdir()] == ["out"]
