"""Definitions of other operators' custom resources, as their projects publish them.

They come from the Go modules of Kubeflow Trainer, JobSet, the training operator, Kueue and the
Prometheus operator, so that a real API server refuses what the operators' own would.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from dpo.config.places import cache_dir
from tests.support.kubernetes import ControlPlane
from tests.support.programs import NotHere, go, go_command

VERSIONS = {
    "github.com/kubeflow/trainer/v2": "v2.3.0",
    "sigs.k8s.io/jobset": "v0.12.0",
    "github.com/kubeflow/training-operator": "v1.8.1",
    "sigs.k8s.io/kueue": "v0.15.0",
    "github.com/prometheus-operator/prometheus-operator": "v0.85.0",
}
_FOLDERS = {
    "github.com/kubeflow/trainer/v2": "manifests/base/crds",
    "sigs.k8s.io/jobset": "config/components/crd/bases",
    "github.com/kubeflow/training-operator": "manifests/base/crds",
    "sigs.k8s.io/kueue": "config/components/crd/bases",
    "github.com/prometheus-operator/prometheus-operator": "example/prometheus-operator-crd",
}
TRAINING_KINDS = (
    *("trainjobs", "trainingruntimes", "clustertrainingruntimes", "jobsets", "pytorchjobs"),
)
KINDS = (
    *TRAINING_KINDS,
    *("resourceflavors", "clusterqueues", "localqueues", "workloadpriorityclasses"),
    *("servicemonitors", "prometheusrules"),
)
"""What our manifests and jobs use."""


def cached() -> Path:
    """Where the definitions are kept."""
    newest = "-".join(version.lstrip("v") for version in VERSIONS.values())
    return cache_dir() / "bin" / f"custom-resources-{newest}"


def ensure() -> list[str]:
    """Download what is missing; returns what cannot be had, a line each.

    Raises:
        NotHere: there is no Go.
    """
    cached().mkdir(parents=True, exist_ok=True)
    problems = []
    for module, path in _FOLDERS.items():
        done = cached() / f"{module.replace('/', '-')}.complete"
        if done.is_file():
            continue
        go_command()
        try:
            files = (module_folder(module, VERSIONS[module]) / path).glob("*.yaml")
        except NotHere as error:
            problems.append(f"{module}: {error}")
            continue
        for file in files:
            if kind_of(file) in KINDS:
                shutil.copyfile(file, cached() / file.name)
        done.touch()
    return problems


def kind_of(file: Path) -> str:
    """What a published file defines, in the plural: such files are named GROUP_KINDS.yaml."""
    return file.stem.rpartition("_")[2]


def module_folder(module: str, version: str) -> Path:
    """The sources of a Go module, read-only.

    Raises:
        NotHere: there is no Go, or the module cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("mod", "download", "-json", f"{module}@{version}")
        return Path(json.loads(go(Path(folder), *arguments))["Dir"])


def define(plane: ControlPlane, kinds: tuple[str, ...] = KINDS) -> None:
    """Make ``kinds`` known to the API server, and wait until it serves them.

    Raises:
        NotHere: the definitions are not at hand, or the API server refuses one.
    """
    files = {kind_of(file): file for file in sorted(cached().glob("*.yaml"))}
    if missing := [kind for kind in kinds if kind not in files]:
        raise NotHere(
            f"no definition of {', '.join(missing)} is at hand: fetch them with "
            "`python -m tests.support.trainer --ensure`"
        )
    for kind in kinds:
        applied(plane, files[kind])
        name = yaml.safe_load(files[kind].read_text(encoding="utf-8"))["metadata"]["name"]
        plane.kubectl("wait", "--for=condition=Established", f"crd/{name}", "--timeout=60s")


def applied(plane: ControlPlane, file: Path | Mapping[str, object]) -> None:
    """Apply a file or an object as administrator.

    Raises:
        NotHere: the API server refuses it.
    """
    given = str(file) if isinstance(file, Path) else "-"
    text = None if isinstance(file, Path) else json.dumps(file)
    done = plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", given, text=text)
    if done.returncode:
        raise NotHere(done.stderr)
