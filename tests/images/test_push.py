"""Images in a real registry, and the package for a cluster that names them by digest."""

import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import yaml

from pipelines import package
from pipelines.deployment import TRAIN_STEPS
from tests.images.scripts import load
from tests.support.programs import NotHere
from tests.support.registry import digest, running_registry

pytestmark = pytest.mark.containers


@pytest.fixture(params=["docker", "podman"])
def build(request, tmp_path, monkeypatch):
    build = load("build")
    monkeypatch.setattr(build, "_ENGINES", (request.param,))
    if request.param == "podman":
        _keep_apart(tmp_path, monkeypatch)
    try:
        build.engine()
    except build.ImageError as error:
        pytest.skip(f"{request.param}: {error}")
    monkeypatch.setattr(build, "NAMES", tmp_path / "images.json")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    return build


def _keep_apart(folder, monkeypatch):
    """Podman with images of its own, and a registry on loopback that needs no certificate."""
    storage = {"driver": "vfs", "graphroot": f"{folder}/images", "runroot": f"{folder}/run"}
    lines = ["[storage]", *(f'{key} = "{value}"' for key, value in storage.items())]
    (folder / "storage.conf").write_text("\n".join(lines))
    registries = '[[registry]]\nlocation = "127.0.0.1"\ninsecure = true\n'
    (folder / "registries.conf").write_text(registries)
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(folder / "storage.conf"))
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(folder / "registries.conf"))


@pytest.fixture
def registry(tmp_path):
    try:
        with running_registry(tmp_path / "registry") as address:
            yield address
    except NotHere as error:
        pytest.skip(str(error))


@pytest.fixture
def small(build, tmp_path):
    """Three images with one file each, under the names that a build notes."""
    names = {}
    for image in build.IMAGES:
        names[image] = f"dpo-{image}:push-test"
        (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY content /content\n")
        (tmp_path / "content").write_text(image)
        command = [build.engine(), "build", "-q", "-t", names[image], str(tmp_path)]
        subprocess.run(command, check=True, capture_output=True)
    build.NAMES.write_text(json.dumps(names))
    yield names
    listed = build.output(
        [build.engine(), "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], ""
    )
    ours = [n for n in listed.splitlines() if n.endswith(":push-test") or "/other/dpo-" in n]
    build.output([build.engine(), "image", "rm", "-f", *ours], "rm")


def test_pushed_images_are_named_by_the_digest_that_the_registry_gives(build, registry, small):
    options = SimpleNamespace(registry=f"{registry}/team/")
    build.push(options)
    names = json.loads(build.NAMES.read_text())
    for image in build.IMAGES:
        given = digest(registry, f"team/dpo-{image}", "push-test")
        assert names[image] == f"{registry}/team/dpo-{image}@{given}"
        assert build.pushed(options) == 0
        command = [build.engine(), "pull", "-q", names[image]]
        subprocess.run(command, check=True, capture_output=True)


def test_what_was_pushed_can_be_pushed_to_another_place(build, registry, small):
    """It was refused: a digest is no name that an image could be given."""
    build.push(SimpleNamespace(registry=f"{registry}/team"))
    build.push(SimpleNamespace(registry=f"{registry}/other"))
    for image, name in json.loads(build.NAMES.read_text()).items():
        assert re.fullmatch(rf"{registry}/other/dpo-{image}@sha256:[0-9a-f]{{64}}", name)
        subprocess.run([build.engine(), "pull", "-q", name], check=True, capture_output=True)
    assert build.pushed(SimpleNamespace(registry=f"{registry}/other")) == 0


def test_a_package_for_the_cluster_names_these_digests(build, registry, small, tmp_path):
    build.push(SimpleNamespace(registry=f"{registry}/team"))
    target = tmp_path / "package.yaml"
    arguments = ["--output", str(target), "--deployment", "cpu", "--images", str(build.NAMES)]
    assert package.main(arguments) == 0
    names = json.loads(build.NAMES.read_text())
    executors = next(yaml.safe_load_all(target.read_text()))["deploymentSpec"]["executors"]
    found = {
        name.removeprefix("exec-"): one["container"]["image"] for name, one in executors.items()
    }
    assert set(TRAIN_STEPS) < set(found)
    for step, image in found.items():
        assert image == names["train" if step in TRAIN_STEPS else "data"], step


def test_a_registry_that_does_not_answer_is_a_message(build, small):
    with pytest.raises(build.ImageError, match="could not be pushed"):
        build.push(SimpleNamespace(registry="127.0.0.1:1/team"))


def test_names_of_another_registry_are_refused(build, small):
    with pytest.raises(build.ImageError, match=r"make images-push REGISTRY=other.test/x"):
        build.pushed(SimpleNamespace(registry="other.test/x"))


def test_an_image_is_there_on_its_own_base_only(build, tmp_path):
    """Names tell what went in but not the base: ``make images BASE=...`` would change nothing."""
    (tmp_path / "Dockerfile").write_text(
        "FROM scratch\nCOPY Dockerfile /\nLABEL org.opencontainers.image.base.digest=sha256:1\n"
    )
    engine = build.engine()
    command = [engine, "build", "-q", "-t", "dpo-data:base-test", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert build._is_built(engine, "dpo-data:base-test", "sha256:1")
    assert not build._is_built(engine, "dpo-data:base-test", "sha256:2")
    build.output([engine, "image", "rm", "-f", "dpo-data:base-test"], "rm")
    assert not build._is_built(engine, "dpo-data:base-test", "sha256:1")
