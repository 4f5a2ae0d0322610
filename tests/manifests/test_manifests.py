"""The overlays on a real API server: everything applies, accounts may do their work and no more."""

import json
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tests.manifests.conftest import applied, eventually, got

pytestmark = pytest.mark.kubernetes

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
# Kueue's own definitions are not at hand: these store its objects without a look at their fields
KUEUE = {"ResourceFlavor": "Cluster", "ClusterQueue": "Cluster", "LocalQueue": "Namespaced"}


def kueue_definition(kind, scope):
    plural = f"{kind.lower()}s"
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1beta1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": anything},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.kueue.x-k8s.io"},
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": scope,
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }


@pytest.fixture(scope="module")
def deployed(plane):
    """All overlays applied; removed at the end."""
    for kind, scope in KUEUE.items():
        applied(plane, kueue_definition(kind, scope))
    for kind in KUEUE:
        name = f"crd/{kind.lower()}s.kueue.x-k8s.io"
        waited = plane.kubectl("wait", "--for=condition=Established", name, "--timeout=120s")
        assert waited.returncode == 0, waited.stderr
    for overlay in OVERLAYS:
        done = plane.kubectl("apply", "--server-side", "-k", str(MANIFESTS / "overlays" / overlay))
        assert done.returncode == 0, (overlay, done.stderr)
        assert "would violate PodSecurity" not in done.stderr, overlay
    return plane


@pytest.fixture(scope="module")
def account(deployed):
    """The API as the service's account sees it."""
    return deployed.client(deployed.account_token("dpo", "dpo-service"))


def may(account, verb, resource, namespace, group=""):
    attributes = client.V1ResourceAttributes(
        verb=verb, resource=resource, namespace=namespace, group=group
    )
    review = client.V1SelfSubjectAccessReview(
        spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
    )
    api = client.AuthorizationV1Api(account)
    return api.create_self_subject_access_review(review).status.allowed


@pytest.mark.parametrize("name", ["dpo-service", "minio"])
def test_our_pods_pass_pod_security_restricted(deployed, name):
    """The controllers make them; were they refused, there would be none."""

    def pods():
        selector = f"app.kubernetes.io/name={name}"
        done = deployed.kubectl("get", "pods", "-n", "dpo", "-l", selector, "-o", "name")
        return done.stdout.split()

    assert eventually(pods)


def test_a_pod_that_is_not_restricted_is_refused(deployed):
    values = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "root", "namespace": "dpo"},
        "spec": {"containers": [{"name": "main", "image": "any:1"}]},
    }
    done = deployed.kubectl("create", "-f", "-", text=json.dumps(values))
    assert done.returncode == 1
    assert 'violates PodSecurity "restricted' in done.stderr


def test_the_quota_holds(deployed):
    limits = {"memory": "1Gi", "nvidia.com/gpu": "1"}
    container = {
        "name": "main",
        "image": "any:1",
        "resources": {"limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    secure = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    values = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "greedy", "namespace": "dpo"},
        "spec": {"securityContext": secure, "containers": [container]},
    }

    def refused():
        # the quota controller counts a moment after the quota is made
        done = deployed.kubectl("create", "-f", "-", "--dry-run=server", text=json.dumps(values))
        return done.stderr if "exceeded quota" in done.stderr else None

    assert "requests.nvidia.com/gpu" in eventually(refused)


@pytest.mark.parametrize(
    ("verb", "resource"), [("create", "runs"), ("get", "runs"), ("create", "experiments")]
)
def test_the_service_may_start_and_read_runs_where_it_is_told(account, verb, resource):
    assert may(account, verb, resource, "team", "pipelines.kubeflow.org")
    assert not may(account, verb, resource, "kubeflow", "pipelines.kubeflow.org")


def test_the_service_may_not_delete_runs(account):
    assert not may(account, "delete", "runs", "team", "pipelines.kubeflow.org")


@pytest.mark.parametrize("namespace", ["dpo", "team", "kubeflow", "kube-system"])
def test_the_service_is_refused_secrets_and_pods_everywhere(account, namespace):
    api = client.CoreV1Api(account)
    for read in (api.list_namespaced_secret, api.list_namespaced_pod):
        with pytest.raises(ApiException) as caught:
            read(namespace)
        assert caught.value.status == 403


def test_nothing_but_what_is_named_goes_in_or_out(deployed):
    policy = got(deployed, "dpo", "networkpolicy", "default-deny")["spec"]
    assert policy["podSelector"] == {}
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]


def test_the_example_secrets_have_every_key_that_pods_read_and_no_value():
    import yaml

    text = (MANIFESTS / "base" / "secrets.example.yaml").read_text()
    secrets = {item["metadata"]["name"]: item["stringData"] for item in yaml.safe_load_all(text)}
    assert {value for keys in secrets.values() for value in keys.values()} == {""}
    service = yaml.safe_load_all((MANIFESTS / "base" / "service.yaml").read_text())
    (container,) = next(service)["spec"]["template"]["spec"]["containers"]
    for variable in container["env"]:
        if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
            assert reference["key"] in secrets[reference["name"]]


def test_an_overlay_can_be_removed(deployed):
    done = deployed.kubectl(
        *("delete", "-k", str(MANIFESTS / "overlays" / "local"), "--wait=false")
    )
    assert done.returncode == 0, done.stderr
    deployed.kubectl("delete", "pods", "--all", "-n", "dpo", "--force", "--grace-period=0")
    eventually(lambda: got(deployed, "dpo", "namespace", "dpo") is None)
