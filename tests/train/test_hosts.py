"""Two hosts: network namespaces of this machine, joined by a cable of their own."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.errors import TrainingError
from dpo.train.stage import run_train
from tests.support.programs import free_port
from tests.train.conftest import SETTINGS

RUN = [*SETTINGS, "n_examples=22", "loss=sft", "trainer=FSDPTrainer"]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts():
    """Names of two namespaces with the addresses 10.77.0.1 and 10.77.0.2."""
    names = [f"dpo{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ends = [f"e{name[3:]}" for name in names]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start_on(host, number, prepared, out, *more):
    """``dpo train`` as torchrun's variables describe this host."""
    variables = {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(number),
        "PET_MASTER_ADDR": "10.77.0.1",
        "PET_MASTER_PORT": "29455",
        "PET_LOCAL_ADDR": f"10.77.0.{number + 1}",
        # gloo takes the address of the host's name otherwise, here that of loopback
        "GLOO_SOCKET_IFNAME": "eth0",
        "DPO_PROCESSES": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [*RUN, f"data={prepared.data}", f"output={out}/model", *more]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, sys.executable, "-m", "dpo", "train", *words],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def hosts():
    try:
        with two_hosts() as names:
            yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces ({error}): run as root with iproute2: ip netns add a")


@pytest.mark.long
def test_two_hosts_end_with_the_weights_of_one(hosts, prepared, tmp_path, monkeypatch):
    both = [start_on(host, n, prepared, tmp_path / "two") for n, host in enumerate(hosts)]
    said = [process.communicate(timeout=900)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    monkeypatch.setenv("DPO_PROCESSES", "2")
    config = restrict(compose(RUN).config, "sft")
    run_train(config, tmp_path / "one", pairs=prepared.data)
    weights = [tmp_path / folder / "model.safetensors" for folder in ("two/model", "one")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.long
def test_a_host_that_goes_away_is_named(hosts, prepared, tmp_path):
    more = ("process_timeout_seconds=20", "n_epochs=100", "n_examples=9000", "eval_every=0")
    both = [start_on(host, n, prepared, tmp_path, *more) for n, host in enumerate(hosts)]
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".model.*.partial/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # the cable is cut: nobody is told
    ip("-n", hosts[1], "link", "set", "eth0", "down")
    began = time.monotonic()
    said = [process.communicate(timeout=300)[1] for process in both]
    assert time.monotonic() - began < 120
    assert all(process.returncode == 1 for process in both), said
    assert "no answer for 20 s from rank 1" in said[0]


@pytest.mark.long
def test_a_host_that_does_not_come_ends_the_wait(prepared, tmp_path, monkeypatch):
    port = free_port()
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}"}
    for name, value in {**variables, "PET_NODE_RANK": "0", "DPO_PROCESSES": "1"}.items():
        monkeypatch.setenv(name, value)
    config = restrict(compose([*RUN, "process_timeout_seconds=5"]).config, "sft")
    began = time.monotonic()
    with pytest.raises(TrainingError, match="2 hosts did not find each other within 5 s"):
        run_train(config, tmp_path / "out", pairs=prepared.data)
    assert time.monotonic() - began < 60


@pytest.mark.long
def test_a_rendezvous_that_nobody_serves_is_one_message(prepared, tmp_path, monkeypatch):
    variables = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}"}
    for name, value in {**variables, "PET_NODE_RANK": "1", "DPO_PROCESSES": "1"}.items():
        monkeypatch.setenv(name, value)
    config = restrict(compose([*RUN, "process_timeout_seconds=5"]).config, "sft")
    with pytest.raises(TrainingError, match="did not find each other") as caught:
        run_train(config, tmp_path / "out", pairs=prepared.data)
    assert "127.0.0.1" in str(caught.value.where)
