"""Applies an overlay to the current cluster, or removes it again; what ``make deploy`` runs.

    python manifests/deploy.py OVERLAY [--deployment gpu] [--undo]

Where ``build/images.json`` names images (``make images-push``), they are put in, and the service is
given the deployment with the same images for the runs that it starts: an overlay of its own in
``build/deploy``, which may be kept and applied by other means.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import ConfigError, DpoError, MissingDependency, PipelineError
from pipelines.deployment import Deployment, load_deployment
from pipelines.package import BUILT_IMAGES, with_images

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "manifests" / "overlays"
TARGET = ROOT / "build" / "deploy"
_MOUNTED = "/etc/dpo/deployment.yaml"
_NAMESPACE = "dpo"
_NAMESPACE_OF_STEPS = "kubeflow"
_SERVICE = "dpo-service"
_LAUNCHER = "dpo-training-launcher"
_PODS_SECONDS = 10.0
"""In which a cluster makes pods, or says why it does not."""
_SECRETS = {"base": ("dpo-store", "dpo-service"), "local": ("minio",)}


def overlays() -> list[str]:
    """Names of the overlays."""
    return sorted(path.name for path in OVERLAYS.iterdir())


def check_overlay(overlay: str) -> None:
    """Refuse a name that no overlay has.

    Raises:
        ConfigError: with the names.
    """
    if overlay not in overlays():
        raise ConfigError(
            f"there is no overlay {overlay!r}", fix=f"OVERLAY is one of {', '.join(overlays())}"
        )


def namespaces_of(kubectl: str, overlay: str) -> tuple[str, str]:
    """The service's namespace and that of the steps: an overlay of the user's own may have chosen
    others than ours.

    Raises:
        ConfigError: no such overlay.
        PipelineError: its files are not what kustomize takes.
    """
    check_overlay(overlay)
    service, steps = _NAMESPACE, _NAMESPACE_OF_STEPS
    for each in _rendered(kubectl, OVERLAYS / overlay):
        meta = each["metadata"]
        named = (meta.get("labels") or {}).get("app.kubernetes.io/name")
        if each["kind"] == "Deployment" and named == _SERVICE:
            service = str(meta.get("namespace") or service)
        if each["kind"] == "ServiceAccount" and str(meta["name"]).endswith(_LAUNCHER):
            # the launcher's account lies where Kubeflow runs the steps
            steps = str(meta.get("namespace") or steps)
    return service, steps


def _rendered(kubectl: str, folder: Path) -> list[dict[str, Any]]:
    """The objects of an overlay.

    Raises:
        PipelineError: its files are not what kustomize takes.
    """
    done = _kubectl(kubectl, "kustomize", str(folder))
    if done.returncode:
        raise _refused(f"the overlay {folder.name} cannot be put together", done.stderr.strip())
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def write_overlay(
    overlay: str, deployment: str, built: Path = BUILT_IMAGES, *, namespace: str = _NAMESPACE
) -> Path:
    """Folder to apply: the overlay itself, or one over it with the images that were built.

    Raises:
        ConfigError: no such overlay or deployment, or a deployment without images.
    """
    check_overlay(overlay)
    chosen = load_deployment(deployment)
    names: dict[str, str] = {}
    if built.is_file():
        names = json.loads(built.read_text(encoding="utf-8"))
        chosen = with_images(chosen, built)
    elif not deployment:
        return OVERLAYS / overlay
    elif not (chosen.images.data and chosen.images.train):
        raise ConfigError(
            f"the deployment {deployment} names no images: the service could start no run with it",
            where=str(built),
            fix="run `make images-push REGISTRY=...`, or name images.data and images.train in a "
            "deployment of yours",
        )
    TARGET.mkdir(parents=True, exist_ok=True)
    settings = chosen.model_dump(mode="json", exclude_defaults=True)
    (TARGET / "deployment.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    variables = {
        "name": _SERVICE,
        "namespace": namespace,
        "behavior": "merge",
        "literals": [f"DPO_SERVICE_DEPLOYMENT={_MOUNTED}"],
    }
    files = {"name": "dpo-deployment", "namespace": namespace, "files": ["deployment.yaml"]}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../../manifests/overlays/{overlay}"],
        "images": [_image(kind, names[kind]) for kind in ("service", "data") if kind in names],
        "configMapGenerator": [variables, files],
        "generatorOptions": {"disableNameSuffixHash": True},
    }
    text = yaml.safe_dump(kustomization, sort_keys=False)
    (TARGET / "kustomization.yaml").write_text(text, encoding="utf-8")
    return TARGET


def _image(kind: str, name: str) -> dict[str, str]:
    repository, at, digest = name.partition("@")
    if at:
        return {"name": f"dpo-{kind}", "newName": repository, "digest": digest}
    repository, _, tag = name.rpartition(":")
    return {"name": f"dpo-{kind}", "newName": repository, "newTag": tag}


def _kubectl(kubectl: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [*shlex.split(kubectl), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise MissingDependency(
            f"{kubectl} was not found", fix="install kubectl, or name yours: make ... KUBECTL=..."
        ) from None


def apply(kubectl: str, folder: Path, namespace: str = _NAMESPACE) -> None:
    """Apply a folder on the server's side; its jobs run anew, and so does a service whose settings
    changed.

    Args:
        kubectl: The command.
        folder: What to apply.
        namespace: Of the service.

    Raises:
        PipelineError: the cluster refused something or does not answer.
    """
    before = _service(kubectl, namespace)
    _remove_jobs(kubectl, folder)
    done = _kubectl(kubectl, "apply", "--server-side", "-k", str(folder))
    print(done.stdout, end="")
    if done.returncode:
        raise _refused("the cluster refused the manifests", done.stderr.strip())
    after = _service(kubectl, namespace)
    if before and after and before[0] != after[0] and before[1] == after[1]:
        # they are variables of its pod, which has those of its start
        _kubectl(kubectl, "rollout", "restart", f"deployment/{_SERVICE}", "-n", namespace)
        print(f"{_SERVICE} starts again, with its changed settings")


def _service(kubectl: str, namespace: str) -> tuple[dict[str, str], int] | None:
    """The settings of the service and the generation of its Deployment, where both are there."""
    names = f"configmap/{_SERVICE}", f"deployment/{_SERVICE}"
    found = {each["kind"]: each for each in _items(kubectl, namespace, *names)}
    if len(found) < len(names):
        return None
    return found["ConfigMap"].get("data", {}), found["Deployment"]["metadata"]["generation"]


def _remove_jobs(kubectl: str, folder: Path) -> None:
    """What a job runs cannot be changed: one with another image would be refused."""
    for each in _rendered(kubectl, folder):
        meta = each["metadata"]
        if each["kind"] == "Job":
            place = ("-n", str(meta.get("namespace") or _NAMESPACE))
            _kubectl(kubectl, "delete", "job", str(meta["name"]), *place, "--ignore-not-found")


def _refused(what: str, said: str) -> PipelineError:
    """What kubectl said, as one message; a cluster that is not there has refused nothing."""
    if re.search(r"connection refused|no such host|i/o timeout|[Uu]nable to connect", said):
        return PipelineError(
            "the cluster does not answer",
            where=said.splitlines()[-1],
            fix='check `kubectl cluster-info`; for another one: KUBECTL="kubectl --context NAME"',
        )
    return PipelineError(what, where=said)


def missing_secrets(kubectl: str, overlay: str, namespace: str) -> list[str]:
    """Secrets that pods of the overlay wait for."""
    wanted = [*_SECRETS["base"], *_SECRETS.get(overlay, ())]
    return [
        name
        for name in wanted
        if _kubectl(kubectl, "get", "secret", name, "-n", namespace).returncode
    ]


def missing_in_steps(kubectl: str, deployment: str, namespace: str) -> list[str]:
    """Secrets of a deployment that pods of steps would wait for, each with what makes it.

    Values are never part of the commands: other users of a machine see what is started on it.
    """
    told: list[str] = []
    for name, (key, making) in _secrets_of(load_deployment(deployment)).items():
        asked = _kubectl(kubectl, "get", "secret", name, "-n", namespace)
        if asked.returncode and "forbidden" in asked.stderr.lower():
            told.append(
                f"whether the Secret {name} of the deployment ({key}) is in the namespace "
                f"{namespace}, where the steps run, this account may not see"
            )
        elif asked.returncode:
            told.append(
                f"the Secret {name} of the deployment ({key}) is missing in the namespace "
                f"{namespace}, where the steps run. Make it with: {kubectl} -n {namespace} create "
                f"secret {making}"
            )
    return told


def _secrets_of(chosen: Deployment) -> dict[str, tuple[str, str]]:
    """By name: the deployment's key for it, and kubectl's words that make it."""
    found: dict[str, tuple[str, str]] = {}
    if store := chosen.store_secret:
        lines = " and ".join(f"{key}=..." for key in store.keys)
        making = f"generic {store.name} --from-env-file=FILE  (lines of FILE: {lines})"
        found[store.name] = ("store_secret", making)
    if (told := chosen.notification) and told.secret:
        making = (
            f"generic {told.secret} --from-env-file=FILE  (line of FILE: {told.secret_key}=...)"
        )
        found.setdefault(told.secret, ("notification", making))
    if signing := chosen.signing:
        making = f"generic {signing.secret} --from-file={signing.secret_key}=FILE  (private key)"
        found.setdefault(signing.secret, ("signing", making))
    for name in chosen.image_pull_secrets:
        file = "--from-file=.dockerconfigjson=FILE  (such as ~/.docker/config.json)"
        making = f"generic {name} --type=kubernetes.io/dockerconfigjson {file}"
        found.setdefault(name, ("image_pull_secrets", making))
    return found


def refused_pods(kubectl: str, namespace: str) -> list[str]:
    """Why pods of the service's namespace are not made (a quota, a limit), as Kubernetes says it.

    What was applied is accepted by then, and nobody else would tell.
    """
    deadline = time.monotonic() + _PODS_SECONDS
    while True:
        found = _items(kubectl, namespace, "deployments")
        more = _items(kubectl, namespace, "jobs,statefulsets")
        others = [each for each in more if not _has_pods(each)]
        told = _told_by_events(kubectl, namespace, others) if others else {}
        why = {each["metadata"]["name"]: _failure(each) for each in found} | told
        made = all(_failure(each) or _made(each) for each in found) and len(told) == len(others)
        if made or time.monotonic() > deadline:
            return [f"{name} gets no pod: {text}" for name, text in why.items() if text]
        time.sleep(0.5)


def _items(kubectl: str, namespace: str, *asked: str) -> list[dict[str, Any]]:
    done = _kubectl(kubectl, "get", *asked, "-n", namespace, "-o", "json")
    found: list[dict[str, Any]] = []
    if done.returncode == 0 and done.stdout:
        found = json.loads(done.stdout)["items"]
    return found


def _has_pods(each: dict[str, Any]) -> bool:
    """Whether a job or a set has had pods, or is to have none."""
    status, spec = each.get("status", {}), each.get("spec", {})
    counted = ("active", "succeeded", "failed", "replicas", "currentReplicas")
    idle = spec.get("suspend") or spec.get("replicas") == 0
    return bool(idle or any(status.get(name) for name in counted))


def _told_by_events(kubectl: str, namespace: str, waiting: list[dict[str, Any]]) -> dict[str, str]:
    """Why these get no pods, by name: a job or a set says it in no condition of its own."""
    names = {each["metadata"]["uid"]: each["metadata"]["name"] for each in waiting}
    events = _items(kubectl, namespace, "events", "--field-selector", "reason=FailedCreate")
    return {
        names[uid]: event["message"]
        for event in events
        if (uid := event["involvedObject"].get("uid")) in names
    }


def _failure(deployment: dict[str, Any]) -> str:
    conditions = deployment.get("status", {}).get("conditions", ())
    failed = [c for c in conditions if c["type"] == "ReplicaFailure" and c["status"] == "True"]
    return str(failed[0].get("message") or failed[0].get("reason")) if failed else ""


def _made(deployment: dict[str, Any]) -> bool:
    status = deployment.get("status", {})
    seen = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    return seen and status.get("updatedReplicas", 0) >= deployment["spec"].get("replicas", 1)


def without_store(name: str) -> str:
    """What keeps the runs of a deployment from the store, if anything."""
    chosen = load_deployment(name)
    if chosen.store_secret or any(key.startswith("AWS_ROLE") for key in chosen.environment):
        return ""
    return (
        f"the deployment {name} names no store_secret: the runs that the "
        "service starts have the store's credentials only where their service account brings them. "
        "Name the Secret, and S3_ENDPOINT under environment, in a deployment of yours "
        "(config/deployment/standalone.yaml shows both)"
    )


def remove(kubectl: str, overlay: str) -> None:
    """Remove what an overlay applied, its namespace and volumes too.

    Raises:
        PipelineError: the cluster refused it.
    """
    folder = str(OVERLAYS / overlay)
    done = _kubectl(kubectl, "delete", "--ignore-not-found", "--wait=false", "-k", folder)
    print(done.stdout, end="")
    if done.returncode:
        raise _refused("not all could be removed", done.stderr.strip())


def main(arguments: list[str] | None = None) -> int:
    """See the module's description; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make deploy", description=__doc__.partition("\n")[0])
    parser.add_argument("overlay", nargs="?", default="", help=", ".join(overlays()))
    parser.add_argument("--deployment", default="", help="of the runs that the service starts")
    parser.add_argument("--kubectl", default="kubectl")
    parser.add_argument("--undo", action="store_true")
    options: Any = parser.parse_args(arguments)
    try:
        if options.undo:
            check_overlay(options.overlay)
            remove(options.kubectl, options.overlay)
            return 0
        namespace, of_steps = namespaces_of(options.kubectl, options.overlay)
        folder = write_overlay(options.overlay, options.deployment, namespace=namespace)
        apply(options.kubectl, folder, namespace)
        for name in missing_secrets(options.kubectl, options.overlay, namespace):
            print(
                f"the Secret {name} is missing in the namespace {namespace}: pods wait for it. "
                "Fill in secrets.example.yaml (manifests/README.md) and apply it"
            )
        if options.deployment:
            for text in missing_in_steps(options.kubectl, options.deployment, of_steps):
                print(text)
        for text in refused_pods(options.kubectl, namespace):
            print(text)
        if options.deployment and (hint := without_store(options.deployment)):
            print(hint)
    except DpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
