"""A cluster's settings: what a deployment file may say, and what the compiled package then asks."""

import copy

import pytest

from dpo.errors import ConfigError
from pipelines import package
from pipelines.deployment import (
    DATA_STEPS,
    TRAIN_STEPS,
    Deployment,
    load_deployment,
    names,
)
from pipelines.resources import Resources
from pipelines.steps import DISPLAY_NAMES
from pipelines.sweep import Sweep, parse_sweep
from tests.support.deployed import IMAGES, all_tasks, deployed, variables


def test_every_step_belongs_to_one_group():
    assert sorted(DATA_STEPS + TRAIN_STEPS) == sorted((*package.STEPS, package.SELECT))


def shown_names(documents):
    return {name: task["taskInfo"]["name"] for name, task in all_tasks(documents).items()}


def test_the_graph_shows_what_each_step_does():
    shown = shown_names(deployed()[0])
    assert {step: shown[step] for step in package.STEPS} == {
        step: DISPLAY_NAMES[step] for step in package.STEPS
    }
    assert shown["sft"] == "Supervised fine-tuning (SFT)"


def test_tasks_whose_outputs_are_collected_keep_their_names():
    """By the name shown ``dsl.Collected`` found them: kubeflow/pipelines#13239."""
    documents = package.deployed_package(
        Deployment.model_validate({"images": IMAGES}),
        Sweep(parse_sweep(["loss.beta=0.1,0.2"])),
        n_shards=2,
    )
    shown = shown_names(documents)
    for name in ("ingest-shard", "preference", "evaluate"):
        assert shown[name] == name
    assert shown["ingest"] == "Ingest and validate"
    assert shown["select"] == "Select the best candidate"


@pytest.mark.parametrize("name", names())
def test_shipped_deployments_compile(name):
    deployment = load_deployment(name, [f"images={IMAGES}"])
    documents = package.deployed_package(deployment)
    assert len(documents) == 2


def test_a_deployment_changes_nothing_that_kubeflow_makes_its_cache_key_of():
    """Image apart, the executors' command and arguments and all of the DAG stay as they were."""
    plain = package.load_package()
    documents, _, _ = deployed(train={"gpus": 4, "memory": "64Gi", "retries": 3}, labels={"a": "b"})
    spec = copy.deepcopy(documents[0])
    for name, executor in spec["deploymentSpec"]["executors"].items():
        executor["container"].pop("resources")
        variables = executor["container"].pop("env")
        # what is said to these two alone: they are never cached
        if name not in ("exec-fingerprint", "exec-finish"):
            image = executor["container"]["image"]
            assert variables == [{"name": "DPO_IMAGE", "value": image}]
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
    for tasks in (all_tasks([spec]), all_tasks(plain)):
        for task in tasks.values():
            task.pop("taskInfo")  # what the graph shows
    package.set_images(plain, {i: IMAGES[k] for k, i in _placeholders().items()})
    assert spec == plain[0]


def _placeholders():
    from components.images import DATA_IMAGE, TRAIN_IMAGE

    return {"data": DATA_IMAGE, "train": TRAIN_IMAGE}


def test_images_of_steps():
    _, containers, _ = deployed()
    used = {
        name.removeprefix("exec-"): container["image"] for name, container in containers.items()
    }
    assert used == {
        **dict.fromkeys(set(DATA_STEPS) - {package.SELECT}, IMAGES["data"]),
        **dict.fromkeys(TRAIN_STEPS, IMAGES["train"]),
    }


def test_resources_of_a_step():
    _, containers, pods = deployed(
        train={
            "cpu": "4",
            "cpu_limit": "8",
            "memory": "16Gi",
            "memory_limit": "20Gi",
            "gpus": 2,
            "gpu_resource": "amd.com/gpu",
            "shared_memory": "2Gi",
        },
        data={"cpu": "250m", "memory": "512Mi"},
    )
    asked = containers["exec-sft"]["resources"]
    assert {k: v for k, v in asked.items() if k.startswith("resource")} == {
        "resourceCpuRequest": "4",
        "resourceCpuLimit": "8",
        "resourceMemoryRequest": "16Gi",
        "resourceMemoryLimit": "20Gi",
    }
    assert asked["accelerator"]["resourceType"] == "amd.com/gpu"
    assert asked["accelerator"]["resourceCount"] == "2"
    assert pods["exec-sft"]["emptyDirMounts"] == [
        {"volumeName": "dshm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "2Gi"}
    ]
    asked = containers["exec-gate"]["resources"]
    assert asked["resourceCpuRequest"] == "250m"
    assert asked["resourceMemoryLimit"] == "512Mi", "the limit is the request unless set"
    assert "accelerator" not in asked
    assert "emptyDirMounts" not in pods["exec-gate"]


def test_no_gpu_asks_for_no_accelerator():
    _, containers, _ = deployed(train={"gpus": 0})
    assert not any("accelerator" in container["resources"] for container in containers.values())


def test_a_step_has_settings_of_its_own():
    _, containers, pods = deployed(
        train={"memory": "8Gi", "node_selector": {"pool": "a"}},
        steps={"preference": {"memory": "80Gi", "gpus": 8}},
    )
    asked = {name: c["resources"]["resourceMemoryRequest"] for name, c in containers.items()}
    assert asked["exec-preference"] == "80Gi"
    assert asked["exec-sft"] == "8Gi"
    assert pods["exec-preference"]["nodeSelector"] == {"labels": {"pool": "a"}}


def test_place_of_a_pod():
    _, _, pods = deployed(
        train={
            "node_selector": {"pool": "gpu", "zone": "b"},
            "affinity": [{"key": "gpu.model", "operator": "In", "values": ["a", "b"]}],
            "tolerations": [
                {"key": "gpu", "effect": "NoSchedule"},
                {"key": "team", "operator": "Equal", "value": "nlp"},
            ],
            "queue": "gpu-queue",
            "queue_priority": "high",
            "timeout_seconds": 3600,
        },
        labels={"team": "nlp"},
    )
    pod = pods["exec-evaluate"]
    assert pod["nodeSelector"] == {"labels": {"pool": "gpu", "zone": "b"}}
    assert pod["nodeAffinity"] == [
        {"matchExpressions": [{"key": "gpu.model", "operator": "In", "values": ["a", "b"]}]}
    ]
    assert pod["tolerations"] == [
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "nlp"},
    ]
    assert pod["activeDeadlineSeconds"] == "3600"
    assert pod["podMetadata"]["labels"] == {
        "team": "nlp",
        "kueue.x-k8s.io/queue-name": "gpu-queue",
        "kueue.x-k8s.io/priority-class": "high",
    }
    assert pods["exec-gate"]["podMetadata"]["labels"] == {"team": "nlp"}
    assert "activeDeadlineSeconds" not in pods["exec-gate"]


def test_secrets_variables_and_volumes():
    _, containers, pods = deployed(
        store_secret={"name": "store", "keys": {"accesskey": "AWS_ACCESS_KEY_ID"}},
        environment={"AWS_ENDPOINT_URL": "http://minio:9000"},
        image_pull_secrets=["registry"],
        model_cache={"claim": "models"},
    )
    for name in containers:
        pod = pods[name]
        assert pod["secretAsEnv"][0]["secretName"] == "store"
        assert pod["secretAsEnv"][0]["keyToEnv"] == [
            {"secretKey": "accesskey", "envVar": "AWS_ACCESS_KEY_ID"}
        ]
        assert pod["imagePullSecret"][0]["secretName"] == "registry"
        assert pod["imagePullPolicy"] == "IfNotPresent"
        assert pod["securityContext"] == {"runAsNonRoot": True}
        assert pod["pvcMount"][0]["constant"] == "models"
        variables = {item["name"]: item["value"] for item in containers[name]["env"]}
        for own in ("DPO_IMAGES", "DPO_MACHINE", "DPO_EXPECTED_SOURCE"):
            assert (own in variables) == (name == "exec-fingerprint")
            variables.pop(own, None)
        assert variables.pop("DPO_IMAGE") == containers[name]["image"]
        assert variables == {
            "AWS_ENDPOINT_URL": "http://minio:9000",
            "DPO_CACHE_DIR": "/cache/dpo",
            "HF_HOME": "/cache/huggingface",
        }


@pytest.mark.parametrize("count", [1, 2])
def test_a_pod_that_starts_a_job_has_no_time_limit(count):
    """A queue may hold the job back for longer than that; the job's own limit begins after it."""
    _, containers, pods = deployed(train={"timeout_seconds": 3600}, nodes={"count": count})
    limits = {step: pods[f"exec-{step}"].get("activeDeadlineSeconds") for step in TRAIN_STEPS}
    training = "3600" if count == 1 else None
    assert limits == {
        "sft": training,
        "preference": training,
        "reference": "3600",
        "evaluate": "3600",
    }
    of_the_job = '"timeout_seconds":3600' in variables(containers, "sft").get("DPO_NODES", "")
    assert of_the_job is (count == 2)


@pytest.mark.parametrize("name", ["q" * 63, "a.b", "1", "a--b"])
def test_names_as_kubernetes_takes_them(name):
    settings = [f"train.queue='{name}'", f"store_secret.name='{name}'"]
    assert load_deployment("cpu", settings).train.queue == name


def test_retries_reach_steps_inside_conditions_and_outlast_the_training():
    documents, _, _ = deployed(
        data={"retries": 2, "retry_wait_seconds": 5},
        train={"retries": 10, "timeout_seconds": 172800, "retry_until_seconds": 1209600},
    )
    tasks = all_tasks(documents)
    assert tasks["publish"]["retryPolicy"]["maxRetryCount"] == 2
    assert tasks["publish"]["retryPolicy"]["backoffDuration"] == "5s"
    assert tasks["preference"]["retryPolicy"] == {
        "maxRetryCount": 10,
        "backoffDuration": "60s",
        "backoffFactor": 2.0,
        "backoffMaxDuration": "1209600s",
    }


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.memory=8GB", "'8GB' is no amount of memory"),
        ("train.memory=4096m", "counts thousandths of a byte: write for example 4096Mi"),
        ("train.memory=true", "train.memory=True"),
        ("train.memory=16", "'16' is less than a MiB: write the unit, as in 16Gi"),
        ("train.shared_memory=0", "less than a MiB"),
        ("train={memory: 8Gi, memory_limit: 4096M}", "memory_limit=4096M is less than the request"),
        ("train={cpu: 2, cpu_limit: 1500m}", "cpu_limit=1500m is less than the request cpu=2"),
        ("train.cpu=2Gi", "counts bytes, not CPU cores"),
        ("train.cpu=.inf", "no amount of CPU"),
        ("train.tolerations=[{key: spot, operator: Exists, value: x}]", "write operator Equal"),
        ("train.tolerations=[{key: '', operator: Equal}]", "its operator is Exists"),
        ("train.tolerations=[{key: a b}]", "train.tolerations.0.key"),
        ("train.affinity=[{key: zone}]", "operator In takes one or more as values, not []"),
        ("train.affinity=[{key: zone, operator: Exists, values: [x]}]", "takes none as values"),
        ("train.affinity=[{key: cores, operator: Gt, values: [x]}]", "takes one integer as values"),
        ("train.node_selector={a b: c}", "train.node_selector.a b"),
        ("labels={team: a b}", "labels.team='a b'"),
        ("labels={-team: a}", "labels.-team"),
        ("train={gpus: 1, gpu_resource: gpu}", "write it with its domain"),
        ("train={gpus: 1, gpu_resource: ''}", "write it with its domain"),
        ("environment={1A: x}", "environment.1A"),
        ("store_secret={name: s, keys: {a: B C}}", "store_secret.keys.a='B C'"),
        ("model_cache={claim: c, mount_path: /dev/shm/}", "shared_memory of step sft"),
        ("model_cache={claim: team.models}", "model_cache.claim='team.models'"),
        ("model_cache={claim: models-}", "model_cache.claim='models-'"),
        ("store_secret.name=a..b", "store_secret.name='a..b'"),
        ("store_secret.name=a-.b", "store_secret.name='a-.b'"),
        ("store_secret.name=store-", "store_secret.name='store-'"),
        ("store_secret={name: s, keys: {..a: B}}", "store_secret.keys...a"),
        ("image_pull_secrets=[Team]", "image_pull_secrets.0='Team'"),
        ("nodes.service_account=a..b", "nodes.service_account='a..b'"),
        (f"train.queue={'q' * 64}", "train.queue"),
        ("notification={url: 'http://a', secret: s, secret_key: a b}", "notification.secret_key"),
        ("checkpoint_uri=foo", "where: checkpoint_uri"),
        ("images.data=D:1", "image 'D:1' is no name"),
        ("images.data='a b:1'", "image 'a b:1' is no name"),
        ("train.gpus=-1", "train.gpus=-1"),
        ("train.gpu=1", "unknown key train.gpu (did you mean train.gpus?)"),
        ("images.data=registry.test/data", "names no fixed version"),
        ("images.data=registry.test:5000/data:latest", "names no fixed version"),
        ("images.data=registry.test/data@sha256:12", "names no fixed version"),
        ("environment.AWS_SECRET_ACCESS_KEY=x", "looks like a credential"),
        ("environment.DPO_SIGNING_KEY=x", "looks like a credential"),
        ("environment.DPO_JUDGE_API_KEY=x", "looks like a credential"),
        ("steps.stf.gpus=1", "steps.stf"),
        ("steps.sft.gpu=1", "unknown key gpu (did you mean gpus?)"),
        ("train.queue_priority=high", "without queue"),
        ("train={retries: 1, timeout_seconds: 700000}", "no retry would ever begin"),
        ("store_secret.name=Not_A_Name", "store_secret.name"),
        ("train.gpus", "is not KEY=VALUE"),
        (
            "store_secret=s",
            "store_secret='s': input should be a mapping with keys of its own: name",
        ),
        ("environment=[A]", "environment=['A']: input should be a mapping with keys of its own"),
        ("environment.A=1", "write it in quotes, in a shell 'environment.A=\"1\"'"),
        ("labels.a=true", "write it in quotes, in a shell 'labels.a=\"true\"'"),
        (
            "image_pull_secrets=[1]",
            "image_pull_secrets.0=1: input should be a text: write it in quotes\n",
        ),
        ("train.tolerations=[", "is not YAML"),
        ("labels=&a {x: *a}", "is not YAML"),
    ],
)
def test_what_cannot_work_is_refused(assignment, message):
    with pytest.raises(ConfigError) as caught:
        load_deployment("cpu", [assignment])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("amount", "compiled"),
    [
        ("16Gi", "16Gi"),
        ("1.5Gi", "1536Mi"),
        ("2000000000", "2000000000"),
        ("4000000k", "4000000000"),
        ("1.5G", "1500000000"),
        ("1e9", "1000000000"),
        # 2**30 / 10 = 107374182.4 bytes, which Kubernetes rounds up
        ("0.1Gi", "107374183"),
    ],
)
def test_memory_as_kubernetes_writes_it_becomes_what_kfp_takes(amount, compiled):
    train = load_deployment("", [f"train.memory={amount}"]).train
    assert train.memory == compiled
    assert Resources.model_validate(train.model_dump()) == train


@pytest.mark.parametrize(
    ("amount", "compiled"),
    [("2", "2"), ("0.5", "0.5"), ("500m", "500m"), ("1k", "1000"), ("0", "0"), ("'4'", "4")],
)
def test_cpu_may_be_written_as_a_number(amount, compiled):
    assert load_deployment("", [f"train.cpu={amount}"]).train.cpu == compiled


def test_a_toleration_with_a_value_asks_for_that_value():
    given = ["{key: spot, value: 'true'}", "{key: spot}", "{key: '', operator: Exists}"]
    found = load_deployment("", [f"train.tolerations=[{', '.join(given)}]"]).train.tolerations
    assert [one.operator for one in found] == ["Equal", "Exists", "Exists"]


@pytest.mark.parametrize(
    "image", ["x:1", "dpo_data:12ab", "localhost:5000/a/b-c.d:1.2", f"[::1]:5/x@sha256:{'0' * 64}"]
)
def test_images_that_registries_know(image):
    assert load_deployment("", [f"images.data='{image}'"]).images.data == image


def test_an_unknown_deployment_names_the_choices():
    with pytest.raises(ConfigError, match=r"no deployment gpus \(did you mean gpu\?\)"):
        load_deployment("gpus")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: [", "not YAML"),
        (b"- a\n", "is a list"),
        (b"train:\n\tgpus: 1\n", r"cannot start any token\n.*mine.yaml:2\n"),
        (b"\xff\xfe\x00", "not a text in UTF-8"),
        (b"train: {gpus: 1}\ndata: {}\ntrain: {cpu: 2}\n", r"key train .* twice\n.*mine.yaml:3\n"),
        (b"steps: {sft: {cpu: 1, cpu: 2}}", "key cpu stands there twice"),
        (b"data: {}\nlabels: &a\n  x: *a\n", r"not YAML: .* recursive node\n.*mine.yaml:2\n"),
    ],
)
def test_a_file_that_is_no_deployment(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_deployment(str(path))


def test_a_deployment_may_share_parts_of_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data: &d {cpu: 2, memory: 1Gi}\n"
        "steps: {sft: &sft {<<: *d, cpu: 4}}\n"
        # deeper down in the file than here
        "train: {<<: *sft}\n"
    )
    train = load_deployment(str(path)).train
    assert (train.cpu, train.memory) == ("4", "1Gi")


def test_assignments_win_over_the_file_and_keep_the_rest():
    deployment = load_deployment("gpu", ["train.gpus=2", "train.gpus=4"])
    assert deployment.train.gpus == 4
    assert deployment.train.shared_memory == load_deployment("gpu").train.shared_memory


def test_defaults_ask_for_no_gpu():
    assert Resources().gpus == Deployment().train.gpus == 0
