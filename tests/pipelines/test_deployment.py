"""A cluster's settings: what a deployment file may say, and what the compiled package then asks."""

import copy
import json

import pytest

from dpo.data.plan import check_source
from dpo.errors import ConfigError
from dpo.plan.booked import check_booked
from pipelines import package
from pipelines.deployment import (
    DATA_STEPS,
    TRAIN_STEPS,
    Deployment,
    load_deployment,
    names,
)
from pipelines.pods import booked
from pipelines.resources import Resources
from pipelines.steps import DISPLAY_NAMES
from pipelines.submit import main
from pipelines.sweep import Sweep, parse_sweep

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
        ("train.tolerations=[", "is not YAML"),
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
    ],
)
def test_a_file_that_is_no_deployment(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_deployment(str(path))


def test_a_deployment_may_share_parts_of_itself(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: &d {cpu: 2, memory: 1Gi}\ntrain: {<<: *d, cpu: 4}\n")
    train = load_deployment(str(path)).train
    assert (train.cpu, train.memory) == ("4", "1Gi")


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
    said = capsys.readouterr().out
    assert "its form names no store" in said
    assert "training keeps no checkpoints" in said


def test_the_command_says_what_is_missing(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "p.yaml"), "--images", str(tmp_path / "none.json")]
    assert package.main(arguments) == 2
    assert "make images-push" in capsys.readouterr().err


def test_submitting_without_images_fails_before_anything_is_sent(monkeypatch, capsys):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    assert main(["--deployment", "cpu", "--store", "s3://bucket"]) == 2
    said = capsys.readouterr().err
    assert "names no data image" in said
    assert "--image data=" in said
    assert "--images build/images.json" in said


def variables(containers, step):
    return {item["name"]: item["value"] for item in containers[f"exec-{step}"].get("env", [])}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--local", "--nodes", "2"], "--nodes is for Kubeflow, and --local runs on this machine"),
        (["--local", "docker", "--nodes", "2"], "--nodes is for Kubeflow"),
        (["--local", "--nodes", "0"], "--nodes is for Kubeflow"),
        (["--local", "--upload"], "--upload is for Kubeflow"),
        (["--local", "--schedule", "0 0 3 * * *"], "--schedule is for Kubeflow"),
        (["--local", "--retry", "x"], "--retry is for Kubeflow"),
        (["--local", "--experiment", "e"], "--experiment is for Kubeflow"),
        (["--local", "--run-name", "r"], "--run-name is for Kubeflow"),
        (["--local", "--cancel-on-interrupt"], "--cancel-on-interrupt is for Kubeflow"),
        (["--local", "--deployment", "cpu"], "--deployment is for images, and --local runs in"),
        (["--local", "--image", "data=garbage:1"], "--image is for images"),
        (["--local", "--from", ""], "--from: the value is empty"),
        (["--cancel", ""], "--cancel: the value is empty; is a variable not set?"),
        (["--retry", ""], "--retry: the value is empty"),
        (["--schedule", " "], "--schedule: the value is empty"),
        (["--cancel", "x", "--retry", "y"], "--cancel and --retry cannot be followed together"),
        (["--cancel", "x", "--dry-run"], "--cancel and --dry-run cannot be followed together"),
        (["--schedule", "0 0 3 * * *", "--wait"], "--schedule and --wait cannot be followed"),
        (["--timeout-seconds", "5"], "--timeout-seconds is for a run that is waited for"),
        (["--wait", "--timeout-seconds", "0"], "'0' is not a positive number of seconds"),
        (["--wait", "--timeout-seconds", "nan"], "'nan' is not a positive number"),
        (["--wait", "--timeout-seconds=-5"], "'-5' is not a positive number"),
        (["--local", "--package", "p.yaml"], "--package is written with --dry-run alone"),
        (["--nodes", "0"], "nodes.count=0: input should be greater than or equal to 1"),
        (["--nodes", "2"], "trainer=BasicTrainer is one process; the package trains over 2 nodes"),
        (
            ["--nodes", "2", "--set", "sft.trainer=FSDPTrainer"],
            "where: preference.trainer",
        ),
        (["--rerun", "sfft"], "no step is called sfft"),
        (["--set", "preferense_lr=1"], "preferense_lr"),
        (["--set", "preference_lr=fast"], "preference_lr"),
        (["--set", "preference_label_smoothing=0.7"], "label_smoothing"),
        (["--set", "sft_batch_size=0"], "batch_size"),
        (["--set", "test_fraction=1.5"], "test_fraction"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    arguments, words, monkeypatch, capsys, tmp_path
):
    # nothing listens there: whoever asked it would say that it does not answer
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    known = [] if "--local" in arguments else ["--image", "data=r/d:1", "--image", "train=r/t:1"]
    assert main([*known, "--store", "s3://bucket", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "does not answer" not in said
    assert list(tmp_path.iterdir()) == []


def test_several_nodes_with_a_trainer_for_them_pass_the_check():
    documents = package.deployed_package(
        Deployment.model_validate({"images": IMAGES, "nodes": {"count": 2}})
    )
    known = booked(documents)
    fsdp = ["trainer=FSDPTrainer"]
    values = {
        **package.defaults(documents),
        "sft_overrides": fsdp,
        "preference_overrides": fsdp,
    }
    check_booked(values, known)
    # an SFT model that is given is not trained
    check_booked({**values, "sft_overrides": [], "sft_model_uri": "s3://b/m"}, known)
    with pytest.raises(ConfigError, match="one process"):
        check_booked({**values, "sft_overrides": []}, known)


def test_gpus_of_all_nodes_count():
    """llama7b, sharded: refused for one node with one GPU, taken for eight such nodes."""
    fsdp = ["trainer=FSDPTrainer"]
    values = {
        "model": "llama7b",
        "sft_batch_size": 8,
        "sft_overrides": fsdp,
        "preference_overrides": fsdp,
    }
    machine = {"gpus": 1, "gpu_memory_gib": 80}
    one, many = ({"sft": {**machine, "nodes": nodes}} for nodes in (1, 8))
    with pytest.raises(ConfigError, match="is predicted to need"):
        check_booked(values, one)
    check_booked(values, many)


def test_the_store_is_the_forms_default_and_the_checkpoints_lie_under_it():
    documents, containers, _ = deployed(store="s3://models/team")
    assert package.defaults(documents)["publish_store"] == "s3://models/team"
    for step in package.STEPS:
        place = variables(containers, step).get("DPO_CHECKPOINTS")
        assert place == ("s3://models/team/checkpoints" if step in ("sft", "preference") else None)
    _, containers, _ = deployed(store="s3://models/team", checkpoint_uri="s3://scratch/c")
    assert variables(containers, "sft")["DPO_CHECKPOINTS"] == "s3://scratch/c"
    _, containers, _ = deployed()
    assert "DPO_CHECKPOINTS" not in variables(containers, "sft")


def test_the_steps_that_may_be_the_last_are_told_whom_to_notify():
    """``finish``, and of a run that is retried gate or publish: Kubeflow runs no second finish."""
    told = {"url": "https://hooks.test/x", "secret": "hook", "secret_key": "key"}
    _, containers, pods = deployed(notification=told)
    for step in package.STEPS:
        notifies = step in ("gate", "publish", "finish")
        expected = "https://hooks.test/x" if notifies else None
        assert variables(containers, step).get("DPO_NOTIFY_URL") == expected
        secrets = pods[f"exec-{step}"].get("secretAsEnv", [])
        assert [secret["secretName"] for secret in secrets] == (["hook"] if notifies else [])
    (secret,) = pods["exec-finish"]["secretAsEnv"]
    assert secret["keyToEnv"] == [{"secretKey": "key", "envVar": "DPO_NOTIFY_SECRET"}]


def test_the_signing_key_is_given_to_publish_alone():
    """The public keys are no secret: every step that reads may check."""
    keys = {"DPO_TRUSTED_KEYS": "-----BEGIN PUBLIC KEY-----"}
    _, containers, pods = deployed(signing={"secret": "signing"}, environment=keys)
    (secret,) = pods["exec-publish"]["secretAsEnv"]
    assert secret["secretName"] == "signing"
    assert secret["keyToEnv"] == [{"secretKey": "key.pem", "envVar": "DPO_SIGNING_KEY"}]
    for step in package.STEPS:
        assert variables(containers, step)["DPO_TRUSTED_KEYS"] == keys["DPO_TRUSTED_KEYS"]
        assert step == "publish" or "secretAsEnv" not in pods[f"exec-{step}"]


def test_images_by_plain_tags_a_store_and_a_preset_make_a_package(tmp_path, capsys):
    target = tmp_path / "package.yaml"
    images = ["--image", "data=dpo-data:1.2", "--image", "train=host:5000/dpo-train:1.2"]
    more = ["--preset", "full", "--store", "s3://models/team"]
    assert (
        package.main(["--output", str(target), "--deployment", "standalone", *images, *more]) == 0
    )
    assert "names no store" not in capsys.readouterr().out
    documents = package.load_package(target)
    executors = documents[0]["deploymentSpec"]["executors"]
    assert executors["exec-ingest"]["container"]["image"] == "dpo-data:1.2"
    assert executors["exec-sft"]["container"]["image"] == "host:5000/dpo-train:1.2"
    shown = package.defaults(documents)
    assert shown["publish_store"] == "s3://models/team"
    assert shown["sft_n_examples"] == 0
    pods = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert {pod["imagePullPolicy"] for pod in pods.values()} == {"IfNotPresent"}
    assert {pod["secretAsEnv"][0]["secretName"] for pod in pods.values()} == {
        "mlpipeline-minio-artifact"
    }
    assert not any("accelerator" in e["container"]["resources"] for e in executors.values())


@pytest.mark.parametrize("image", ["data", "web=x:1", "data="])
def test_an_image_that_is_no_kind_and_name(image):
    with pytest.raises(ConfigError, match="is not KIND=NAME"):
        package.image_assignments([image])


def test_a_run_that_cannot_fit_is_refused_before_anything_is_sent(monkeypatch, capsys):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    arguments = ["--image", "data=r/d:1", "--image", "train=r/t:1", "--store", "s3://bucket"]
    gpus = ["--deploy", "train.gpus=1", "--deploy", "train.gpu_memory_gib=24"]
    assert main([*arguments, *gpus, "--deployment", "gpu", "--set", "model=llama7b"]) == 2
    said = capsys.readouterr().err
    assert "is predicted to need" in said
    assert "1 GPU(s) that have 24 GiB" in said


def test_a_run_from_the_form_is_refused_by_its_first_step_in_the_same_words(monkeypatch):
    documents, containers, _ = deployed(train={"gpus": 1, "gpu_memory_gib": 24})
    monkeypatch.setenv("DPO_MACHINE", variables(containers, "fingerprint")["DPO_MACHINE"])
    with pytest.raises(ConfigError, match=r"1 GPU\(s\) that have 24 GiB"):
        check_booked({**package.defaults(documents), "model": "llama7b"})
    check_booked({**package.defaults(documents), "model": "tiny"})


def test_an_image_of_other_code_is_refused_by_the_first_step(monkeypatch):
    _, containers, _ = deployed()
    expected = variables(containers, "fingerprint")["DPO_EXPECTED_SOURCE"]
    monkeypatch.setenv("DPO_EXPECTED_SOURCE", expected)
    check_source()
    monkeypatch.setenv("DPO_EXPECTED_SOURCE", "0" * 64)
    with pytest.raises(ConfigError, match="built from other code than the pipeline") as caught:
        check_source()
    assert expected[:12] in str(caught.value)
    assert "0" * 12 in str(caught.value)


def test_a_sweep_is_deployed_like_any_other_run():
    documents = package.deployed_package(
        Deployment.model_validate({"images": IMAGES, "train": {"memory": "9Gi"}}),
        Sweep(parse_sweep(["loss.beta=0.1,0.2", "loss=dpo,ipo"])),
    )
    assert package.steps_of(documents)[-4:] == ("select", "gate", "publish", "finish")
    executors = documents[0]["deploymentSpec"]["executors"]
    assert {name.removeprefix("exec-") for name in executors} == {
        *package.STEPS,
        *("select", "evaluate-2"),
    }
    assert executors["exec-evaluate-2"]["container"]["resources"]["resourceMemoryRequest"] == "9Gi"
    assert executors["exec-select"]["container"]["image"] == IMAGES["data"]
    (loop,) = [t for t in all_tasks(documents).values() if "parameterIterator" in t]
    items = json.loads(loop["parameterIterator"]["items"]["raw"])
    assert [json.loads(item) for item in items] == [
        ["loss.beta=0.1", "loss=dpo"],
        ["loss.beta=0.1", "loss=ipo"],
        ["loss.beta=0.2", "loss=dpo"],
        ["loss.beta=0.2", "loss=ipo"],
    ]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["loss.beta"], "is not KEY=VALUE,VALUE"),
        (["loss.bta=0.1,0.2"], "loss.bta"),
        (["loss.beta=0.1,0.1"], "names a value twice"),
        (["gate.force=true,false"], "is not of it"),
        (["loss.beta=" + ",".join(f"0.{n:02}" for n in range(1, 40))], "39 candidates"),
    ],
)
def test_a_sweep_that_cannot_work(sweep, words, capsys, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:1")
    arguments = ["--image", "data=r/d:1", "--image", "train=r/t:1", "--store", "s3://bucket"]
    assert main([*arguments, *(item for s in sweep for item in ("--sweep", s))]) == 2
    assert words in capsys.readouterr().err


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
