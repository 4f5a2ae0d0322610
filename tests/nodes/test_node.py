"""Pods of a training job as real processes: inputs from a store, FSDP between them, result back."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict, stage_json
from dpo.data.stage import run_ingest
from dpo.nodes import lease
from dpo.nodes.request import VARIABLE, Request
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.remote import fetch_output, read_remote_manifest, send_output
from dpo.storage.store import open_store
from tests.support.programs import free_port
from tests.support.waiting import wait_until
from tests.train.conftest import SETTINGS


@pytest.fixture(scope="module")
def settings():
    overrides = [*SETTINGS, "loss=sft", "trainer=FSDPTrainer", "n_examples=16"]
    return restrict(compose(overrides).config, "sft")


@pytest.fixture(scope="module")
def data(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pairs"
    run_ingest(restrict(compose(SETTINGS).config, "ingest"), folder)
    return folder


def request_for(settings, store, *, seconds=60, code=None):
    return Request(
        stage="sft",
        settings=stage_json(settings, "sft"),
        code=code_fingerprint("sft") if code is None else code,
        inputs={"pairs": f"{store}/pairs"},
        output=f"{store}/checkpoint",
        checkpoints="",
        lease_seconds=seconds,
    )


def start(request, rank, count, port, log):
    # a pod has a disk of its own
    disk = log.with_suffix(".disk")
    disk.mkdir()
    variables = {
        VARIABLE: request.to_json(),
        "PET_NNODES": str(count),
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(disk),
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dpo.train.node"],
            env={**os.environ, **variables},
            stdout=file,
            stderr=file,
        )


@pytest.mark.long
def test_two_nodes_train_from_store_to_store(settings, data, tmp_path):
    store = (tmp_path / "store").as_uri()
    send_output(data, f"{store}/pairs")
    request = request_for(settings, store)
    with lease.held(request.output, 60), both(request, tmp_path / "nodes") as (pods, logs):
        codes = [pod.wait(timeout=300) for pod in pods]
    assert codes == [0, 0], [log.read_text() for log in logs]
    assert read_remote_manifest(request.output, stage="sft").details["examples"] == 16
    assert fetch_output(request.output, tmp_path / "fetched").stage == "sft"


@pytest.mark.long
@pytest.mark.minio
def test_killed_nodes_go_on_from_checkpoints_in_a_bucket(data, bucket_url, tmp_path):
    """Pairs, checkpoints and result in a real MinIO; the weights are those of an undisturbed job.

    A pod's disk is gone with it, and so is that of the nodes here.
    """
    longer = ["n_examples=64", "batch_size=4", "checkpoint_every=4"]
    overrides = [*SETTINGS, "loss=sft", "trainer=FSDPTrainer", *longer]
    settings = restrict(compose(overrides).config, "sft")
    open_store(bucket_url).check(create=True)
    hashes = {}
    for name, killed in (("undisturbed", False), ("killed", True)):
        url = f"{bucket_url}/{name}"
        send_output(data, f"{url}/pairs")
        request = replace(request_for(settings, url), checkpoints=f"{url}/checkpoints")
        with lease.held(request.output, 60):
            if killed:
                with both(request, tmp_path / "first"):
                    wait_for_a_checkpoint(open_store(request.checkpoints))
            with both(request, tmp_path / name) as (pods, logs):
                codes = [pod.wait(timeout=300) for pod in pods]
        assert codes == [0, 0], [log.read_text() for log in logs]
        assert ("goes on after step" in logs[0].read_text()) is killed, logs[0].read_text()
        hashes[name] = read_remote_manifest(request.output, stage="sft").content_hash
    assert hashes["killed"] == hashes["undisturbed"]


@contextmanager
def both(request, folder):
    """Two nodes and their logs; SIGKILL for one that still runs at the end."""
    folder.mkdir()
    port, logs = free_port(), [folder / f"{rank}.log" for rank in (0, 1)]
    pods = [start(request, rank, 2, port, logs[rank]) for rank in (0, 1)]
    try:
        yield pods, logs
    finally:
        for pod in pods:
            pod.kill()
            pod.wait()


def wait_for_a_checkpoint(store):
    wait_until(lambda: any(key.endswith("LATEST") for key, _ in store.scan()))


def test_a_node_ends_when_nobody_asks_for_its_work(settings, data, tmp_path):
    """Node 1 of 2 waits for a node 0 that never comes, as when the launcher was killed.

    It ends with 0: Kubeflow Trainer's runtime restarts containers that end with an error.
    """
    store = (tmp_path / "store").as_uri()
    send_output(data, f"{store}/pairs")
    request, log = request_for(settings, store, seconds=5), tmp_path / "log"
    pod = start(request, 1, 2, free_port(), log)
    try:
        assert pod.wait(timeout=120) == 0, log.read_text()
    finally:
        if pod.poll() is None:
            pod.send_signal(signal.SIGKILL)
    text = log.read_text()
    assert "gave no sign for 5 s" in text
    assert "Traceback" not in text, text


def test_a_node_without_its_launcher_ends_well_whatever_else_fails(settings, tmp_path):
    """The store that has no sign for it takes no checkpoint either: with 1 the container was
    started again, for the time of another lease."""
    request = request_for(settings, (tmp_path / "store").as_uri(), seconds=1)
    code = (
        "import sys, time\n"
        "from dpo.errors import StoreUnavailable, TrainingStopped\n"
        "from dpo.train import node\n"
        "def train(*_):\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except TrainingStopped:\n"
        "        raise StoreUnavailable('no checkpoint was written')\n"
        "node.train = train\n"
        "sys.exit(node.main())\n"
    )
    command, variables = [sys.executable, "-c", code], {**os.environ, VARIABLE: request.to_json()}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no checkpoint was written" in done.stderr
    assert "gave no sign for 1 s; this node ended" in done.stderr


def test_a_node_with_other_code_says_so(settings, data, tmp_path):
    store, log = (tmp_path / "store").as_uri(), tmp_path / "log"
    send_output(data, f"{store}/pairs")
    pod = start(request_for(settings, store, code="f" * 64), 0, 1, free_port(), log)
    assert pod.wait(timeout=120) == 2
    text = log.read_text()
    assert "build images and package from one commit" in text
    assert "Traceback" not in text


def test_an_interrupted_upload_leaves_no_manifest(data, tmp_path, monkeypatch):
    from dpo.storage.folder import FolderStore

    url = (tmp_path / "store").as_uri()
    send_output(data, url)

    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "upload", broken)
    with pytest.raises(KeyboardInterrupt):
        send_output(data, url)
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_time_is_not_lost_on_a_missing_input(settings, tmp_path):
    began, log = time.monotonic(), tmp_path / "log"
    request = request_for(settings, (tmp_path / "store").as_uri())
    pod = start(request, 0, 1, free_port(), log)
    assert pod.wait(timeout=120) == 1
    assert "no complete output" in log.read_text()
    assert time.monotonic() - began < 100
