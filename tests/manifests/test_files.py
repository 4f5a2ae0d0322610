"""The manifests as files: published schemas, references, secrets without values. No cluster."""

import re

import kubernetes_validate
import pytest
import yaml

from dpo.errors import ConfigError
from pipelines.service.settings import Settings
from tests.support.checkout import ROOT

MANIFESTS = ROOT / "manifests"
KUBERNETES = "1.34"
# of operators; their schemas are not among those of Kubernetes
FOREIGN = re.compile(r"\.(x-k8s\.io|coreos\.com)/|^kustomize\.")
# neither snippets for CI nor the alerts' tests are Kubernetes objects
FILES = sorted(
    path
    for path in MANIFESTS.rglob("*.yaml")
    if path.name != "rules.test.yaml" and path.parent.name != "ci"
)


def documents(path):
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def everything():
    return [item for path in FILES for item in documents(path) if "kind" in item]


def pods():
    """Name and pod specification of each workload."""
    for item in everything():
        spec = item.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield item["metadata"]["name"], template["spec"]


def named(path):
    return str(path.relative_to(MANIFESTS))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_fits_the_published_schemas(path):
    for item in documents(path):
        if not FOREIGN.search(item["apiVersion"]):
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_the_schemas_do_refuse_a_wrong_field():
    item = documents(MANIFESTS / "base/service.yaml")[0]
    item["spec"]["template"]["spec"]["containers"][0]["securityContexts"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "kustomization.yaml"], ids=named)
def test_everything_that_a_kustomization_names_is_there(path):
    (values,) = documents(path)
    generated = [f for g in values.get("configMapGenerator", []) for f in g.get("files", [])]
    for name in [*values.get("resources", []), *values.get("components", []), *generated]:
        assert (path.parent / name).exists(), name


def test_every_file_is_used():
    kustomizations = [path for path in FILES if path.name == "kustomization.yaml"]
    used = {
        (path.parent / name).resolve()
        for path in kustomizations
        for name in documents(path)[0].get("resources", [])
    }
    for path in FILES:
        if path.name not in ("kustomization.yaml", "secrets.example.yaml"):
            assert path.resolve() in used, path


def test_the_variables_of_kubernetes_services_reach_no_pod():
    """Those of our Service begin as the service's settings do, which knows none of the names."""
    with pytest.raises(ConfigError, match="unknown variable DPO_SERVICE_SERVICE_HOST"):
        Settings.from_environment({"DPO_SERVICE_SERVICE_HOST": "10.0.0.7"})
    assert [name for name, pod in pods() if pod.get("enableServiceLinks", True)] == []


def test_the_service_of_a_profile_starts_its_runs_there():
    overlay = MANIFESTS / "overlays/multi-user"
    generators = documents(overlay / "kustomization.yaml")[0]["configMapGenerator"]
    (settings,) = [item["literals"] for item in generators if item["name"] == "dpo-service"]
    (role,) = [item for item in documents(overlay / "role.yaml") if item["kind"] == "Role"]
    assert f"KF_PIPELINES_NAMESPACE={role['metadata']['namespace']}" in settings


def test_who_may_go_out_may_do_so_by_ipv6():
    """And to no private network of either kind."""
    blocks = [
        sorted((peer["ipBlock"]["cidr"], tuple(peer["ipBlock"]["except"])) for peer in rule["to"])
        for item in everything()
        if item["kind"] == "NetworkPolicy"
        for rule in item["spec"].get("egress", [])
        if any("ipBlock" in peer for peer in rule.get("to", []))
    ]
    private = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16")
    assert len(blocks) == 2
    for found in blocks:
        assert found == [("0.0.0.0/0", private), ("::/0", ("fc00::/7", "fe80::/10"))]


def test_no_secret_has_a_value():
    secrets = [item for item in everything() if item["kind"] == "Secret"]
    assert {item["metadata"]["name"] for item in secrets} == {"dpo-store", "dpo-service", "minio"}
    for secret in secrets:
        assert set(secret["stringData"].values()) == {""}
        assert "data" not in secret


def test_every_key_that_a_pod_reads_is_in_an_example():
    examples = {}
    for item in everything():
        if item["kind"] == "Secret":
            examples.setdefault(item["metadata"]["name"], set()).update(item["stringData"])
    for name, spec in pods():
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert reference["key"] in examples[reference["name"]], name
            for source in container.get("envFrom", []):
                if reference := source.get("secretRef"):
                    assert reference["name"] in examples, name


def test_the_probes_wait_for_the_answer_that_names_what_is_away():
    """A second is the default; seen with a kubelet: 4.3 s for ``/ready`` without a store."""
    service = dict(pods())["dpo-service"]["containers"][0]
    assert service["readinessProbe"].get("timeoutSeconds", 1) >= 10
    assert service["livenessProbe"].get("timeoutSeconds", 1) >= 5


def test_every_container_is_limited_and_has_no_token():
    found = dict(pods())
    assert set(found) == {"dpo-service", "dpo-retention", "minio", "minio-setup"}
    for name, spec in found.items():
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"], name
        for container in spec["containers"]:
            assert set(container["resources"]) == {"requests", "limits"}, name
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert not container["image"].endswith(":latest"), name
