"""A TrainJob's pods do what the job says: the test runs each pod's own command on this machine.

Trainer, JobSet and the scheduler make the pods; the store is a real MinIO whose credentials come
from a Secret. In place of a kubelet, the test starts what stands in the pod and reports its end.
"""

import os
import re
import subprocess
import sys
import time
from base64 import b64decode

import pytest
from kubernetes import client as k

from dpo.config.compose import compose
from dpo.config.nodes import NodeResources, NodesConfig, NodesOptions
from dpo.config.stages import restrict, stage_json
from dpo.data.stage import run_ingest
from dpo.nodes.request import Request
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.manifest import read_manifest
from dpo.storage.remote import send_output
from dpo.storage.store import open_store
from dpo.train.stage import run_train
from tests.nodes.conftest import Launched, bound, ended, play
from tests.support.programs import free_port
from tests.train.conftest import SETTINGS

pytestmark = [pytest.mark.kubernetes, pytest.mark.minio]

KEYS = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}


def environment(core, pod):
    """A container's variables as its kubelet would set them: plain, from a Secret, from the pod."""
    found = {}
    for variable in pod.spec.containers[0].env:
        source = variable.value_from
        if source is None:
            found[variable.name] = variable.value or ""
        elif source.secret_key_ref:
            secret = core.read_namespaced_secret(source.secret_key_ref.name, "team")
            found[variable.name] = b64decode(secret.data[source.secret_key_ref.key]).decode()
        else:
            path = source.field_ref.field_path
            name = re.fullmatch(r"metadata\.(annotations|labels)\['(.+)'\]", path)
            assert name, path
            found[variable.name] = getattr(pod.metadata, name[1])[name[2]]
    # what refers to others, $(NAME), is for the command alone: none of ours does
    assert not any("$(" in value for value in found.values())
    return found


class Node:
    """A pod's container as a process, with a disk of its own for ``/tmp``."""

    def __init__(self, plane, pod, port, folder):
        self.plane, self.pod = plane, pod
        self.log = folder / f"{pod.metadata.name}.log"
        disk = folder / pod.metadata.name
        disk.mkdir(parents=True)
        (container,) = pod.spec.containers
        assert container.command[0] == "python3"
        assert not container.args
        variables = environment(k.CoreV1Api(plane.client()), pod)
        # the service's name is known inside of the cluster alone
        assert re.fullmatch(r"dpo-sft-\w+-node-0-0\.dpo-sft-\w+", variables["PET_MASTER_ADDR"])
        here = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "TMPDIR": str(disk)}
        # nothing of this machine's own environment but where programs are
        own = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *container.command[1:]],
                env={**own, "OMP_NUM_THREADS": "1", **variables, **here},
                stdout=file,
                stderr=file,
            )
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        play(plane, pod, "Running", {"running": {"startedAt": now}})

    def wait(self):
        code = self.process.wait(timeout=240)
        play(self.plane, self.pod, "Failed" if code else "Succeeded", ended(code))
        return code


def test_the_pods_of_a_job_train_what_one_host_trains(
    plane, cluster, bucket_url, minio_server, tmp_path, monkeypatch
):
    settings = restrict(
        compose([*SETTINGS, "loss=sft", "trainer=FSDPTrainer", "n_examples=16"]).config, "sft"
    )
    pairs = tmp_path / "pairs"
    run_ingest(restrict(compose(SETTINGS).config, "ingest"), pairs)
    open_store(bucket_url).check(create=True)
    send_output(pairs, f"{bucket_url}/pairs")
    request = Request(
        stage="sft",
        settings=stage_json(settings, "sft"),
        code=code_fingerprint("sft"),
        inputs={"pairs": f"{bucket_url}/pairs"},
        output=f"{bucket_url}/checkpoint",
        checkpoints=f"{bucket_url}/checkpoints",
        lease_seconds=60,
    )
    given = minio_server.environment()
    secret = {key: given[name] for key, name in KEYS.items()}
    k.CoreV1Api(plane.client()).create_namespaced_secret(
        "team", {"metadata": {"name": "store"}, "stringData": secret}
    )
    config = NodesConfig(
        options=NodesOptions(count=2),
        resources=NodeResources(cpu="1", memory="1Gi"),
        image="registry.test/train:1",
        environment={name: value for name, value in given.items() if name not in KEYS.values()},
        secret="store",
        secret_keys=KEYS,
    )
    launched = Launched(cluster, config, request)
    port = free_port()
    nodes = [Node(plane, pod, port, tmp_path / "nodes") for pod in bound(plane, request)]
    try:
        codes = [node.wait() for node in nodes]
    finally:
        for node in nodes:
            node.process.kill()
    logs = "\n".join(node.log.read_text() for node in nodes)
    assert codes == [0, 0], logs
    manifest = launched.result()
    assert not isinstance(manifest, Exception), manifest
    assert not any(value in logs for value in secret.values())

    monkeypatch.setenv("DPO_PROCESSES", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_train(settings, tmp_path / "one", pairs=pairs)
    one = read_manifest(tmp_path / "one", stage="sft")
    assert manifest.content_hash == one.content_hash
    assert manifest.details["examples"] == one.details["examples"] == 16
