"""The whole DAG in real containers, and how containers that fail are seen."""

import json
import os
import signal
import subprocess
import time

import pytest

from pipelines import containers
from tests.images.scripts import load
from tests.support.checkout import Checkout

pytestmark = [pytest.mark.containers, pytest.mark.minio]


@pytest.fixture(scope="module")
def images():
    """Names of the images of this checkout; built first where they are missing."""
    build = load("build")
    # kfp speaks to no other
    build._ENGINES = ("docker",)
    try:
        build.engine()
    except build.ImageError as error:
        pytest.skip(str(error))
    assert build.main(["build", "--image", "data", "--image", "train"]) == 0
    return build.NAMES


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout.make(tmp_path_factory.mktemp("checkout"))


def in_containers(checkout, images, environment, *arguments):
    """``submit.py --local docker`` with the fast settings; its outcome."""
    command = checkout.command("docker", "--images", str(images), "--output", "json", *arguments)
    # --local takes the place to run in as its value
    command.remove("docker")
    command.insert(command.index("--local") + 1, "docker")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout.folder,
        env=checkout.environment(**environment),
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture(scope="module")
def bucket(minio_server):
    store = ["--store", "s3://containers/team", "--set", "publish.create_bucket=true"]
    return store, minio_server.environment()


@pytest.fixture(scope="module")
def first(checkout, images, bucket):
    store, environment = bucket
    outcome, done = in_containers(checkout, images, environment, *store)
    assert outcome["state"] == "succeeded", done.stderr
    return outcome


def test_every_step_runs_in_its_container_and_publishes_to_minio(first):
    assert set(first["steps"].values()) == {"done"}
    assert first["published"]["url"].startswith("s3://containers/team/")


def test_a_second_run_finds_the_steps_cached(checkout, images, bucket, first):
    store, environment = bucket
    outcome, _ = in_containers(checkout, images, environment, *store)
    cached = {step for step, state in outcome["steps"].items() if state == "cached"}
    assert cached == {"ingest", "sft", "reference", "preference", "evaluate"}
    assert outcome["published"]["unchanged"]


def test_the_content_is_that_of_a_run_in_processes(checkout, first):
    outcome = checkout.outcome()
    assert outcome["published"]["content_hash"] == first["published"]["content_hash"]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_container_that_ends_at_once_keeps_its_exit_code(images, code):
    name = json.loads(images.read_text())["data"]
    client = containers.connect()
    try:
        for _ in range(3):
            found = containers.run_container(client, name, ["sh", "-c", f"exit {code}"], {})
            assert found == code
    finally:
        client.close()


def test_a_step_that_fails_at_once_fails_the_run(checkout, images, bucket, first, tmp_path):
    """The trap: kfp took such a container for a success."""
    names = json.loads(images.read_text())
    broken = "dpo-broken:1"
    text = f'FROM {names["train"]}\nENTRYPOINT ["false"]\n'
    subprocess.run(["docker", "build", "-q", "-t", broken, "-"], input=text, text=True, check=True)
    other = tmp_path / "images.json"
    other.write_text(json.dumps({**names, "train": broken}))
    store, environment = bucket
    try:
        outcome, done = in_containers(checkout, other, environment, *store)
    finally:
        subprocess.run(["docker", "image", "rm", "-f", broken], check=True, capture_output=True)
    assert outcome["state"] == "failed", done.stderr
    assert done.returncode == 1
    assert not outcome["published"]


def test_a_missing_image_is_named_before_the_run(checkout, tmp_path, images):
    other = tmp_path / "images.json"
    other.write_text('{"data": "dpo-none:1", "train": "dpo-none:2"}')
    _, done = in_containers(checkout, other, {})
    assert done.returncode == 2, "nothing was started"
    assert "the image dpo-none:1 is not on this machine" in done.stderr
    assert "make images" in done.stderr


def test_no_engine_is_a_message(checkout, tmp_path, images):
    nowhere = {"DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    _, done = in_containers(checkout, images, nowhere)
    assert done.returncode == 2, "nothing was started"
    assert "no container engine answers" in done.stderr


def test_ctrl_c_ends_the_containers(checkout, images, bucket):
    _, environment = bucket
    command = checkout.command("--images", str(images), "--set", "preference.n_examples=60")
    command.insert(command.index("--local") + 1, "docker")
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=checkout.folder,
        env=checkout.environment(**environment),
        # a test run in the background ignores SIGINT, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    client = containers.connect()
    try:
        label = {"label": containers.RUN_LABEL}
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not client.containers.list(filters=label):
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert not client.containers.list(filters=label)
    finally:
        client.close()
