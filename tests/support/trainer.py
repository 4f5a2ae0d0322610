"""Kubeflow Trainer and JobSet, their real controllers, beside the control plane of the tests.

    python -m tests.support.trainer --ensure     build them with Go (a few minutes, once)

Admission webhooks and the runtime ``torch-distributed`` are those that the two projects publish in
their Go modules, as the definitions of their kinds (``custom_resources``). The training operator's
controller is not run.
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from dpo.config.places import cache_dir
from tests.support.custom_resources import (
    TRAINING_KINDS,
    VERSIONS,
    applied,
    define,
    module_folder,
)
from tests.support.custom_resources import ensure as ensure_definitions
from tests.support.kubernetes import ControlPlane
from tests.support.programs import NotHere, ended_with_us, free_port, go

_TRAINER, _JOBSET = "github.com/kubeflow/trainer/v2", "sigs.k8s.io/jobset"
TRAINER = VERSIONS[_TRAINER]
_GO = "1.26"
_READY_SECONDS = 120.0
_PROGRAMS = {"trainer": f"{_TRAINER}/cmd/trainer-controller-manager", "jobset": _JOBSET}
_FILES = {
    _TRAINER: {
        "manifests/base/webhook/manifests.yaml": "webhooks/trainer.yaml",
        "manifests/base/runtimes/torch_distributed.yaml": "runtime.yaml",
    },
    _JOBSET: {"config/components/webhook/manifests.yaml": "webhooks/jobset.yaml"},
}


def cached() -> Path:
    """Where programs and manifests are kept."""
    return cache_dir() / "bin" / f"kubeflow-trainer-{TRAINER}"


def ensure() -> None:
    """Build what is missing.

    Raises:
        NotHere: there is no Go, or a build failed.
    """
    for problem in ensure_definitions():
        # tests that need them skip, and say so
        print(problem, file=sys.stderr)
    if (cached() / "complete").is_file():
        return
    cached().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached()) as name:
        folder = Path(name)
        (folder / "go.mod").write_text(
            f"module trainer\n\ngo {_GO}\n\n"
            + "".join(f"tool {path}\n" for path in _PROGRAMS.values())
            + "".join(f"require {module} {VERSIONS[module]}\n" for module in _FILES)
        )
        go(folder, "mod", "tidy")
        for program, path in _PROGRAMS.items():
            print(f"building the controller of {program} ...", flush=True)
            go(folder, "build", "-o", program, "-ldflags", "-s -w", path)
            (folder / program).replace(cached() / program)
        for module, files in _FILES.items():
            for path, name in files.items():
                (cached() / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(module_folder(module, VERSIONS[module]) / path, cached() / name)
    (cached() / "complete").touch()


@contextmanager
def running_trainer(plane: ControlPlane) -> Iterator[None]:
    """Definitions of TrainJob, JobSet and PyTorchJob; the first two with their controllers.

    Raises:
        NotHere: they are not built, or do not start.
    """
    if not (cached() / "complete").is_file():
        raise NotHere(
            "Kubeflow Trainer was not found: build it with "
            "`python -m tests.support.trainer --ensure`"
        )
    define(plane, TRAINING_KINDS)
    started = [_start(plane, program) for program in _PROGRAMS]
    try:
        for process, port, folder in started:
            _wait(process, port, folder)
        applied(plane, cached() / "runtime.yaml")
        yield
    finally:
        for process, _, _ in started:
            process.kill()
            process.wait()


def _start(plane: ControlPlane, program: str) -> tuple[subprocess.Popen[bytes], int, Path]:
    folder = plane.folder / program
    certificates = folder / "k8s-webhook-server" / "serving-certs"
    certificates.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(certificates / "tls.key"), "-out", str(certificates / "tls.crt")),
        ],
        check=True,
        capture_output=True,
    )
    webhook, health = free_port(), free_port()
    common = {
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"port": webhook, "host": "127.0.0.1"},
        "leaderElection": {"leaderElect": False},
    }
    own: dict[str, Any] = {
        "trainer": {
            "apiVersion": "config.trainer.kubeflow.org/v1alpha1",
            "certManagement": {"enable": False},
        },
        "jobset": {
            "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
            "internalCertManagement": {"enable": False},
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**common, **own[program]}))
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            ended_with_us(str(cached() / program), f"--config={file}"),
            env={**os.environ, "KUBECONFIG": str(plane.kubeconfig), "TMPDIR": str(folder)},
            stdout=log,
            stderr=log,
        )
    _register_webhooks(plane, program, certificates / "tls.crt", webhook)
    return process, health, folder


def _register_webhooks(plane: ControlPlane, program: str, certificate: Path, port: int) -> None:
    """The project's own admission webhooks, called at an address instead of a service."""
    bundle = base64.b64encode(certificate.read_bytes()).decode()
    for document in yaml.safe_load_all((cached() / "webhooks" / f"{program}.yaml").read_text()):
        if not document:
            continue
        document["metadata"]["name"] = f"{program}-{document['metadata']['name']}"
        for hook in document["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"https://127.0.0.1:{port}{path}", "caBundle": bundle}
        applied(plane, document)


def _wait(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return
        time.sleep(0.2)
    raise NotHere(f"{folder.name} did not start:\n{(folder / 'log').read_text()[-2000:]}")


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description="Kubeflow Trainer and JobSet for tests.")
    parser.add_argument(
        "--ensure", action="store_true", required=True, help="build what is missing"
    )
    parser.parse_args()
    try:
        ensure()
    except NotHere as error:
        raise SystemExit(str(error)) from None
    print(f"Kubeflow Trainer {TRAINER}, JobSet {VERSIONS[_JOBSET]}: {cached()}")


if __name__ == "__main__":
    main()
