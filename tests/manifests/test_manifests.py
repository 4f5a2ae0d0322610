"""The overlays on a real API server: everything applies, accounts may do their work and no more."""

import json
import shlex
import shutil

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException

from tests.images.scripts import load
from tests.manifests.conftest import eventually, got
from tests.support.checkout import ROOT
from tests.support.kubernetes import binary

pytestmark = pytest.mark.kubernetes

MANIFESTS = ROOT / "manifests"
deploy = load("deploy", folder="manifests")
OVERLAYS = deploy.overlays()
TRAINER = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
ALL = ("dpo-service", "dpo-retention", "dpo-training-launcher", "minio")


def home(account):
    return "kubeflow" if account == "dpo-training-launcher" else "dpo"


@pytest.fixture(scope="module")
def deployed(plane):
    """All overlays applied as `make deploy` does; removed at the end."""
    for overlay in OVERLAYS:
        done = plane.kubectl("apply", "--server-side", "-k", str(MANIFESTS / "overlays" / overlay))
        assert done.returncode == 0, (overlay, done.stderr)
        assert "would violate PodSecurity" not in done.stderr, overlay
    return plane


@pytest.fixture(scope="module")
def account(deployed):
    """The API as the service's account sees it."""
    return deployed.client(deployed.account_token("dpo", "dpo-service"))


@pytest.fixture(scope="module")
def launcher(deployed):
    """The API as a training step's account sees it."""
    return deployed.client(deployed.account_token("kubeflow", "dpo-training-launcher"))


def may(account, verb, resource, namespace, group=""):
    attributes = client.V1ResourceAttributes(
        verb=verb, resource=resource, namespace=namespace, group=group
    )
    review = client.V1SelfSubjectAccessReview(
        spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
    )
    api = client.AuthorizationV1Api(account)
    return api.create_self_subject_access_review(review).status.allowed


@pytest.mark.parametrize("name", ["dpo-service", "minio", "minio-setup"])
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


def refused(call, *arguments, **settings):
    with pytest.raises(ApiException) as caught:
        call(*arguments, **settings)
    assert caught.value.status == 403, caught.value.body


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("namespace", ["dpo", "team", "kubeflow", "kube-system"])
def test_no_account_reads_secrets_or_configuration_anywhere(deployed, name, namespace):
    api = client.CoreV1Api(deployed.client(deployed.account_token(home(name), name)))
    refused(api.list_namespaced_secret, namespace)
    refused(api.list_namespaced_config_map, namespace)
    refused(api.read_namespaced_secret, "dpo-store", namespace)


@pytest.mark.parametrize("name", [n for n in ALL if n != "dpo-training-launcher"])
def test_accounts_of_our_pods_have_no_right_in_kubernetes(deployed, name):
    core = client.CoreV1Api(deployed.client(deployed.account_token("dpo", name)))
    refused(core.list_namespaced_pod, "dpo")
    refused(core.list_namespaced_event, "dpo")
    refused(core.list_node)


def train_job(name):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = models.TrainerV1alpha1TrainJob(
        apiVersion="trainer.kubeflow.org/v1alpha1",
        kind="TrainJob",
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(name=name),
        spec=models.TrainerV1alpha1TrainJobSpec(
            runtimeRef=models.TrainerV1alpha1RuntimeRef(name="torch-distributed"),
            trainer=models.TrainerV1alpha1Trainer(image="any:1", numNodes=2),
        ),
    )
    return job.to_dict()


def test_the_launcher_makes_a_training_reads_its_pods_and_removes_it(launcher):
    jobs, core = client.CustomObjectsApi(launcher), client.CoreV1Api(launcher)
    place = {**TRAINER, "namespace": "kubeflow"}
    jobs.create_namespaced_custom_object(**place, body=train_job("one"))
    assert (
        jobs.get_namespaced_custom_object(**place, name="one")["spec"]["trainer"]["numNodes"] == 2
    )
    # what was asked for stays as it was: the lease is an object in the store
    suspend = {"spec": {"suspend": True}}
    refused(jobs.patch_namespaced_custom_object, **place, name="one", body=suspend)
    core.list_namespaced_pod("kubeflow")
    core.list_namespaced_event("kubeflow")
    with pytest.raises(ApiException) as caught:
        core.read_namespaced_pod_log("none", "kubeflow")
    assert caught.value.status == 404, "it may read logs; this pod is not there"
    jobs.delete_namespaced_custom_object(**place, name="one")


def test_the_launcher_makes_the_older_kind_of_training_too(launcher):
    place = {"group": "kubeflow.org", "version": "v1", "plural": "pytorchjobs"}
    body = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "one"}}
    jobs = client.CustomObjectsApi(launcher)
    jobs.create_namespaced_custom_object(**place, namespace="kubeflow", body=body)
    jobs.delete_namespaced_custom_object(**place, namespace="kubeflow", name="one")


def test_a_training_with_a_field_that_is_none_is_refused(launcher):
    body = train_job("two")
    body["spec"]["podSpecOverrides"] = []
    with pytest.raises(ApiException, match="podSpecOverrides") as caught:
        client.CustomObjectsApi(launcher).create_namespaced_custom_object(
            **TRAINER, namespace="kubeflow", body=body, field_validation="Strict"
        )
    assert caught.value.status == 400


@pytest.mark.parametrize("namespace", ["dpo", "kube-system", "default"])
def test_the_launcher_is_refused_other_namespaces(launcher, namespace):
    jobs, core = client.CustomObjectsApi(launcher), client.CoreV1Api(launcher)
    refused(
        jobs.create_namespaced_custom_object, **TRAINER, namespace=namespace, body=train_job("x")
    )
    refused(core.list_namespaced_pod, namespace)


def test_the_launcher_is_refused_everything_else(launcher):
    core, batch = client.CoreV1Api(launcher), client.BatchV1Api(launcher)
    spec = {"containers": [{"name": "main", "image": "any:1"}], "restartPolicy": "Never"}
    pod = {"metadata": {"name": "own"}, "spec": spec}
    refused(core.create_namespaced_pod, "kubeflow", pod)
    refused(core.delete_namespaced_pod, "any", "kubeflow")
    refused(
        batch.create_namespaced_job,
        "kubeflow",
        {"metadata": {"name": "own"}, "spec": {"template": {"spec": spec}}},
    )
    refused(core.create_namespaced_secret, "kubeflow", {"metadata": {"name": "own"}})
    refused(core.list_node)
    for resource, group in [
        ("pods/exec", ""),
        ("serviceaccounts/token", ""),
        ("roles", "rbac.authorization.k8s.io"),
        ("rolebindings", "rbac.authorization.k8s.io"),
        ("trainingruntimes", "trainer.kubeflow.org"),
    ]:
        assert not may(launcher, "create", resource, "kubeflow", group), resource


def test_kubeflows_own_accounts_may_launch_too(deployed):
    for namespace, name in [("kubeflow", "pipeline-runner"), ("team", "default-editor")]:
        done = deployed.kubectl(
            *("auth", "can-i", "create", "trainjobs.trainer.kubeflow.org", "-n", namespace),
            f"--as=system:serviceaccount:{namespace}:{name}",
        )
        assert done.stdout.strip() == "yes", (namespace, done.stderr)


def test_the_retention_job_makes_an_admitted_pod(deployed):
    done = deployed.kubectl("create", "job", "by-hand", "--from=cronjob/dpo-retention", "-n", "dpo")
    assert done.returncode == 0, done.stderr

    def pod():
        done = deployed.kubectl("get", "pods", "-n", "dpo", "-l", "job-name=by-hand", "-o", "json")
        return next(iter(json.loads(done.stdout)["items"]), None)

    (container,) = eventually(pod)["spec"]["containers"]
    assert container["args"][2:] == ["dpo", "retain", "$(STORE)", "keep=$(KEEP)"]
    settings = got(deployed, "dpo", "configmap", "dpo-retention")["data"]
    assert settings == {"STORE": "s3://models/preference", "KEEP": "5"}


def test_nothing_but_what_is_named_goes_in_or_out(deployed):
    policy = got(deployed, "dpo", "networkpolicy", "default-deny")["spec"]
    assert policy["podSelector"] == {}
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]


def kubectl_of(plane):
    return f"{shlex.quote(binary('kubectl'))} --kubeconfig={shlex.quote(str(plane.kubeconfig))}"


@pytest.mark.parametrize("overlay", ["dev", "local"])
def test_make_deploy_and_its_undo(deployed, overlay, capsys, monkeypatch, tmp_path):
    """Last in this file: it removes the namespace."""
    eventually(lambda: not _ending(deployed))
    names = tmp_path / "images.json"
    digest = "sha256:" + "1" * 64
    built = {kind: f"registry.test/dpo-{kind}@{digest}" for kind in ("data", "train")}
    names.write_text(json.dumps({**built, "service": "dpo-service:7"}))
    # kustomize follows relative paths only, so the written overlay stands beside the others
    monkeypatch.setattr(deploy, "TARGET", ROOT / "build" / "deploy-test")
    monkeypatch.setattr(
        deploy,
        "write_overlay",
        lambda name, deployment, write=deploy.write_overlay, **place: write(
            name, deployment, names, **place
        ),
    )
    command = [overlay, "--kubectl", kubectl_of(deployed), "--deployment", "gpu"]
    assert deploy.main(command) == 0
    told = capsys.readouterr().out
    assert "the Secret dpo-store is missing in the namespace dpo" in told
    assert ("the Secret minio is missing" in told) is (overlay == "local")
    found = got(deployed, "dpo", "deployment", "dpo-service")
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == "dpo-service:7"
    retention = got(deployed, "dpo", "cronjob", "dpo-retention")
    pod = retention["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == f"registry.test/dpo-data@{digest}"
    settings = got(deployed, "dpo", "configmap", "dpo-service")["data"]
    assert settings["DPO_SERVICE_DEPLOYMENT"] == "/etc/dpo/deployment.yaml"
    given = got(deployed, "dpo", "configmap", "dpo-deployment")["data"]["deployment.yaml"]
    assert f"train: registry.test/dpo-train@{digest}" in given
    assert deploy.main([*command, "--undo"]) == 0
    deployed.kubectl("delete", "pods", "--all", "-n", "dpo", "--force", "--grace-period=0")
    eventually(lambda: got(deployed, "dpo", "namespace", "dpo") is None)
    assert got(deployed, "kubeflow", "serviceaccount", "dpo-training-launcher") is None
    assert got(deployed, "kubeflow", "namespace", "kubeflow")


def _ending(plane):
    found = got(plane, "dpo", "namespace", "dpo")
    return bool(found) and found["status"]["phase"] == "Terminating"


def test_a_cluster_that_does_not_answer_is_a_message(capsys):
    kubectl = (
        f"{binary('kubectl')} --server=https://127.0.0.1:1 --token=x --insecure-skip-tls-verify"
    )
    assert deploy.main(["dev", "--kubectl", kubectl]) == 1
    assert "the cluster does not answer" in capsys.readouterr().err


def test_an_overlay_is_deployed_again_with_other_images_and_settings(
    deployed, tmp_path, monkeypatch, capsys
):
    """It was refused: what a job runs cannot be changed; and a service went on as before."""
    folder = MANIFESTS.parent / "build" / "deploy-again"
    monkeypatch.setattr(deploy, "TARGET", folder)
    kubectl = (
        f"{shlex.quote(binary('kubectl'))} --kubeconfig={shlex.quote(str(deployed.kubeconfig))}"
    )
    built = tmp_path / "images.json"
    restarted = "kubectl.kubernetes.io/restartedAt"

    def deploy_again(tag, deployment):
        built.write_text(
            json.dumps({kind: f"dpo-{kind}:{tag}" for kind in ("data", "train", "service")})
        )
        deploy.apply(kubectl, deploy.write_overlay("local", deployment, built))
        job = got(deployed, "dpo", "job", "minio-setup")["spec"]["template"]["spec"]
        assert job["containers"][0]["image"] == f"dpo-data:{tag}"
        service = got(deployed, "dpo", "deployment", "dpo-service")["spec"]["template"]
        return (service["metadata"].get("annotations") or {}).get(restarted)

    try:
        before = deploy_again("1", "cpu")
        # a new image starts it anew by itself
        assert deploy_again("2", "cpu") == before
        settings = [
            "create",
            "configmap",
            "dpo-service",
            "-n",
            "dpo",
            "--dry-run=client",
            "-o",
            "json",
        ]
        other = deployed.kubectl(*settings, "--from-literal=DPO_SERVICE_MAX_RUNS=2").stdout
        done = deployed.kubectl("replace", "-f", "-", text=other)
        assert done.returncode == 0, done.stderr
        assert deploy_again("2", "cpu") not in (None, before)
        assert "dpo-service starts again" in capsys.readouterr().out
    finally:
        shutil.rmtree(folder, ignore_errors=True)
