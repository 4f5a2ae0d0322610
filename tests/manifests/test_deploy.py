"""What ``make deploy`` applies and says, without a cluster."""

import json
import time

import pytest
import yaml

from dpo.errors import ConfigError
from tests.images.scripts import load
from tests.support.checkout import ROOT

deploy = load("deploy", folder="manifests")


def fake_kubectl(folder, script):
    """A program in the place of kubectl; its path."""
    kubectl = folder / "kubectl"
    kubectl.write_text(f"#!/bin/sh\n{script}")
    kubectl.chmod(0o755)
    return str(kubectl)


def test_without_images_of_ours_the_overlay_is_applied_as_it_is(tmp_path):
    found = deploy.write_overlay("dev", "", tmp_path / "none.json")
    assert found == ROOT / "manifests" / "overlays" / "dev"


def test_images_of_ours_are_put_in_and_given_to_the_service(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "TARGET", tmp_path / "deploy")
    digest = "sha256:" + "a" * 64
    names = {
        "data": f"registry.test:5000/team/dpo-data@{digest}",
        "train": "registry.test:5000/team/dpo-train:7",
        "service": "dpo-service:12ab",
    }
    (tmp_path / "images.json").write_text(json.dumps(names))
    folder = deploy.write_overlay("gpu", "gpu", tmp_path / "images.json")
    written = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert written["resources"] == ["../../manifests/overlays/gpu"]
    assert written["images"] == [
        {"name": "dpo-service", "newName": "dpo-service", "newTag": "12ab"},
        {"name": "dpo-data", "newName": "registry.test:5000/team/dpo-data", "digest": digest},
    ]
    given = yaml.safe_load((folder / "deployment.yaml").read_text())
    assert given["images"] == {"data": names["data"], "train": names["train"]}
    assert given["train"]["gpus"] == 1


def test_a_deployment_is_never_passed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deploy, "TARGET", tmp_path / "deploy")
    none = tmp_path / "none.json"
    with pytest.raises(ConfigError, match="there is no deployment gpus"):
        deploy.write_overlay("dev", "gpus", none)
    with pytest.raises(ConfigError, match="the deployment gpu names no images"):
        deploy.write_overlay("dev", "gpu", none)
    own = tmp_path / "own.yaml"
    own.write_text("images: {data: r/data:1, train: r/train:2}\n")
    folder = deploy.write_overlay("dev", str(own), none)
    given = yaml.safe_load((folder / "deployment.yaml").read_text())
    assert given["images"] == {"data": "r/data:1", "train": "r/train:2"}
    assert yaml.safe_load((folder / "kustomization.yaml").read_text())["images"] == []


@pytest.mark.parametrize("name", ["", "production", "../base"])
def test_another_overlay_is_named_with_the_choices(name, tmp_path):
    with pytest.raises(ConfigError, match="dev, gpu, local, multi-user"):
        deploy.write_overlay(name, "", tmp_path / "none.json")


@pytest.mark.parametrize(("name", "hint"), [("cpu", True), ("standalone", False)])
def test_runs_without_credentials_of_the_store_are_told(name, hint):
    assert ("store_secret" in deploy.without_store(name)) is hint


def test_without_kubectl_there_is_a_message(capsys):
    assert deploy.main(["dev", "--kubectl", "no-such-kubectl"]) != 0
    assert "no-such-kubectl was not found" in capsys.readouterr().err


def test_a_cluster_that_is_down_has_refused_nothing(tmp_path, capsys):
    kubectl = fake_kubectl(
        tmp_path, "echo 'dial tcp 127.0.0.1:1: connect: connection refused' >&2\nexit 1\n"
    )
    assert deploy.main(["dev", "--kubectl", kubectl]) == 1
    said = capsys.readouterr().err
    assert said.startswith("the cluster does not answer")
    assert "KUBECTL=" in said


def test_pods_that_a_quota_does_not_let_in_are_told(tmp_path, capsys, monkeypatch):
    """The manifests are accepted; what the controller says of its pods nobody sees (1.34)."""
    monkeypatch.setattr(deploy, "_PODS_SECONDS", 1.0)
    why = 'pods "dpo-service-1" is forbidden: exceeded quota: mine, requested: requests.cpu=100m'
    refused = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": why}
    meta = {"name": "dpo-service", "generation": 1}
    status = {"observedGeneration": 1, "unavailableReplicas": 1, "conditions": [refused]}
    made = {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1}
    items = [
        {"metadata": meta, "spec": {"replicas": 1}, "status": status},
        {"metadata": {**meta, "name": "minio"}, "spec": {"replicas": 1}, "status": made},
    ]
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"items": items}))
    kubectl = fake_kubectl(tmp_path, f'[ "$1 $2" = "get deployments" ] && cat "{answer}"\nexit 0\n')
    assert deploy.main(["dev", "--kubectl", kubectl]) == 0
    assert capsys.readouterr().out == f"dpo-service gets no pod: {why}\n"


def test_a_job_that_gets_no_pod_is_told_by_its_events(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deploy, "_PODS_SECONDS", 1.0)
    why = 'pods "minio-setup-x" is forbidden: failed quota: mine: must specify limits.cpu'
    answers = {
        "deployments": [],
        "jobs,statefulsets": [
            {"metadata": {"name": "minio-setup", "uid": "1"}, "spec": {}, "status": {}},
            {"metadata": {"name": "retention-1", "uid": "2"}, "status": {"succeeded": 1}},
            {"metadata": {"name": "minio", "uid": "3"}, "status": {"replicas": 1}},
        ],
        "events": [
            {"involvedObject": {"uid": "1"}, "message": why},
            # of a pod that was refused before, and of a job that is gone
            {"involvedObject": {"uid": "3"}, "message": "once"},
            {"involvedObject": {"uid": "4"}, "message": "gone"},
        ],
    }
    for name, items in answers.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"items": items}))
    kubectl = fake_kubectl(
        tmp_path, f'[ "$1" != get ] || cat "{tmp_path}/$2.json" 2>/dev/null\nexit 0\n'
    )
    began = time.monotonic()
    assert deploy.main(["dev", "--kubectl", kubectl]) == 0
    assert capsys.readouterr().out == f"minio-setup gets no pod: {why}\n"
    assert time.monotonic() - began < 1.0


def test_an_overlay_of_the_users_own_is_asked_for_its_namespace(tmp_path, capsys, monkeypatch):
    """What is merged into the service's settings, and looked for, was that of another one."""
    monkeypatch.setattr(deploy, "TARGET", tmp_path / "deploy")
    monkeypatch.setattr(deploy, "_PODS_SECONDS", 0.0)
    monkeypatch.setattr(deploy, "OVERLAYS", tmp_path / "overlays")
    (tmp_path / "overlays/mine").mkdir(parents=True)
    labels = {"app.kubernetes.io/name": "dpo-service"}
    service = {"name": "a-dpo-service", "namespace": "tuning", "labels": labels}
    rendered = [
        {"kind": "ServiceAccount", "metadata": {"name": "launcher", "namespace": "kubeflow"}},
        {"kind": "Service", "metadata": {**service, "namespace": "of-no-account"}},
        {"kind": "Deployment", "metadata": service},
    ]
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(rendered))
    kubectl = fake_kubectl(
        tmp_path,
        f'echo "$@" >> "{tmp_path}/calls"\ncase $1 in\n'
        f'kustomize) cat "{tmp_path}/all.yaml";;\nget) [ "$2" != secret ];;\nesac\n',
    )
    own = tmp_path / "own.yaml"
    own.write_text("images: {data: r/data:1, train: r/train:2}\nstore_secret: {name: s}\n")
    assert deploy.main(["mine", "--kubectl", kubectl, "--deployment", str(own)]) == 0
    assert "the Secret dpo-store is missing in the namespace tuning" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "deploy/kustomization.yaml").read_text())
    assert [each["namespace"] for each in written["configMapGenerator"]] == ["tuning"] * 2
    asked = [line for line in (tmp_path / "calls").read_text().splitlines() if " -n " in line]
    assert asked
    # the Secret of the steps is looked for where the launcher's account is
    assert all(" -n tuning" in line for line in asked if line != "get secret s -n kubeflow")


def test_an_overlay_that_kustomize_does_not_take_is_told(tmp_path, capsys):
    kubectl = fake_kubectl(
        tmp_path, "echo 'error: accumulating resources: no such file' >&2\nexit 1\n"
    )
    assert deploy.main(["dev", "--kubectl", kubectl]) == 1
    said = capsys.readouterr().err
    assert said.startswith("the overlay dev cannot be put together")
    assert "accumulating resources" in said


DEPLOYMENT = """
images: {data: r/data:1, train: r/train:2}
store_secret: {name: of-the-store, keys: {accesskey: MINIO_ACCESS_KEY, secretkey: MINIO_SECRET_KEY}}
signing: {secret: of-the-key}
image_pull_secrets: [of-the-registry]
notification: {url: "https://hooks.test/x", secret: there}
"""


def test_secrets_that_steps_wait_for_are_looked_for_where_steps_run(tmp_path, capsys, monkeypatch):
    """The service was told of its own; the first run then waited for the store's."""
    monkeypatch.setattr(deploy, "TARGET", tmp_path / "deploy")
    monkeypatch.setattr(deploy, "_PODS_SECONDS", 0.0)
    launcher = {"name": "dpo-training-launcher", "namespace": "team"}
    (tmp_path / "all.yaml").write_text(
        yaml.safe_dump_all([None, {"kind": "ServiceAccount", "metadata": launcher}])
    )
    kubectl = fake_kubectl(
        tmp_path,
        f'case "$1 $2 $3" in\nkustomize*) cat "{tmp_path}/all.yaml";;\n'
        "*of-the-store) [ $5 != team ];;\n"
        "*of-the-registry) echo 'Error: secrets is Forbidden' >&2; exit 1;;\n"
        "*of-the-key) exit 1;;\nesac\n",
    )
    own = tmp_path / "own.yaml"
    own.write_text(DEPLOYMENT)
    assert deploy.main(["multi-user", "--kubectl", kubectl, "--deployment", str(own)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the Secret of-the-store of the deployment (store_secret) is missing in the namespace team,"
        f" where the steps run. Make it with: {kubectl} -n team create secret generic of-the-store "
        "--from-env-file=FILE  (lines of FILE: accesskey=... and secretkey=...)",
        "the Secret of-the-key of the deployment (signing) is missing in the namespace team, where "
        f"the steps run. Make it with: {kubectl} -n team create secret generic of-the-key "
        "--from-file=key.pem=FILE  (private key)",
        "whether the Secret of-the-registry of the deployment (image_pull_secrets) is in the "
        "namespace team, where the steps run, this account may not see",
    ]
