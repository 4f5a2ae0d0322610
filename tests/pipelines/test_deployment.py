"""A cluster's settings: what a deployment file may say, and what the compiled package then asks."""

import copy

import pytest

from dpo.errors import ConfigError
from pipelines import package
from pipelines.deployment import (
    DATA_STEPS,
    TRAIN_STEPS,
    Deployment,
    Resources,
    load_deployment,
    names,
)
from pipelines.submit import main

IMAGES = {"data": "registry.test/data@sha256:" + "0" * 64, "train": "registry.test/train:1.2"}


def deployed(**values):
    documents = package.deployed_package(Deployment.model_validate({"images": IMAGES, **values}))
    spec, platform = documents
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = {
        name: executor["container"]
        for name, executor in spec["deploymentSpec"]["executors"].items()
    }
    return documents, containers, pods


def all_tasks(documents):
    spec = documents[0]
    found = {}
    for component in [spec["root"], *spec["components"].values()]:
        found.update(component.get("dag", {}).get("tasks", {}))
    return found


def test_every_step_belongs_to_one_group():
    assert sorted(DATA_STEPS + TRAIN_STEPS) == sorted(package.STEPS)


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
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"].pop("resources")
    for component in [spec["root"], *spec["components"].values()]:
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
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
        **dict.fromkeys(DATA_STEPS, IMAGES["data"]),
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
        assert variables == {
            "AWS_ENDPOINT_URL": "http://minio:9000",
            "DPO_CACHE_DIR": "/cache/dpo",
            "HF_HOME": "/cache/huggingface",
        }


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
        ("train.memory=8GB", "train.memory='8GB'"),
        ("train.gpus=-1", "train.gpus=-1"),
        ("train.gpu=1", "unknown key train.gpu (did you mean gpus?)"),
        ("images.data=registry.test/data", "names no fixed version"),
        ("images.data=registry.test:5000/data:latest", "names no fixed version"),
        ("images.data=registry.test/data@sha256:12", "names no fixed version"),
        ("environment.AWS_SECRET_ACCESS_KEY=x", "looks like a credential"),
        ("steps.stf.gpus=1", "steps.stf"),
        ("steps.sft.gpu=1", "unknown key gpu (did you mean gpus?)"),
        ("train.queue_priority=high", "without queue"),
        ("train={retries: 1, timeout_seconds: 700000}", "no retry would ever begin"),
        ("store_secret.name=Not_A_Name", "store_secret.name"),
        ("train.gpus", "is not KEY=VALUE"),
        ("train.tolerations=[", "is not YAML"),
    ],
)
def test_what_cannot_work_is_refused(assignment, message):
    with pytest.raises(ConfigError) as caught:
        load_deployment("cpu", [assignment])
    assert message in str(caught.value)


def test_an_unknown_deployment_names_the_choices():
    with pytest.raises(ConfigError, match=r"no deployment gpus \(did you mean gpu\?\)"):
        load_deployment("gpus")


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- a\n", "is a list")])
def test_a_file_that_is_no_deployment(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_deployment(str(path))


def test_assignments_win_over_the_file_and_keep_the_rest():
    deployment = load_deployment("gpu", ["train.gpus=2", "train.gpus=4"])
    assert deployment.train.gpus == 4
    assert deployment.train.shared_memory == load_deployment("gpu").train.shared_memory


def test_defaults_ask_for_no_gpu():
    assert Resources().gpus == Deployment().train.gpus == 0


def test_a_package_without_images_is_refused_with_the_command_that_makes_them():
    with pytest.raises(ConfigError, match="names no data image") as caught:
        package.deployed_package(Deployment())
    assert "make images-push" in str(caught.value)


def test_the_command_writes_a_package_that_can_be_uploaded(tmp_path, capsys):
    names_file = tmp_path / "images.json"
    names_file.write_text('{"data": "r/data:1", "train": "r/train:1"}')
    target = tmp_path / "out" / "package.yaml"
    arguments = ["--output", str(target), "--deployment", "cpu", "--images", str(names_file)]
    assert package.main([*arguments, "--deploy", "images.data=r/mine:2"]) == 0
    text = target.read_text()
    assert "r/mine:2" in text
    assert "r/train:1" in text
    assert "unset" not in text
    assert len(package.load_package(target)) == 2


def test_the_command_says_what_is_missing(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "p.yaml"), "--images", str(tmp_path / "none.json")]
    assert package.main(arguments) == 2
    assert "make images-push" in capsys.readouterr().err


def test_submitting_without_images_fails_before_anything_is_sent(monkeypatch, capsys):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    assert main(["--deployment", "cpu", "--store", "s3://bucket"]) == 2
    assert "names no data image" in capsys.readouterr().err


def checkpoint_places(documents):
    executors = documents[0]["deploymentSpec"]["executors"]
    return {
        name.removeprefix("exec-"): variable["value"]
        for name, executor in executors.items()
        for variable in executor["container"].get("env", [])
        if variable["name"] == "DPO_CHECKPOINTS"
    }


@pytest.mark.parametrize(
    ("store", "uri", "place"),
    [
        ("s3://bucket/models", "", "s3://bucket/models/checkpoints"),
        ("minio://bucket/", "", "minio://bucket/checkpoints"),
        ("s3://bucket", "s3://other/kept", "s3://other/kept"),
        # another pod sees no folder of this one, unless a volume is said to be there
        ("file:///models", "", None),
        ("file:///models", "/volume/kept", "/volume/kept"),
    ],
)
def test_training_keeps_checkpoints_where_a_new_pod_finds_them(store, uri, place):
    values = {"images": IMAGES, **({"checkpoint_uri": uri} if uri else {})}
    documents = package.deployed_package(Deployment.model_validate(values))
    package.keep_checkpoints(documents, store)
    expected = {"sft": place, "preference": place} if place else {}
    assert checkpoint_places(documents) == expected
