"""Packages for a cluster: the command that writes them, and what is refused before they run."""

import json
import os

import pytest

from dpo.data.plan import check_source, plan_run
from dpo.errors import ConfigError
from dpo.plan.booked import check_booked
from pipelines import package
from pipelines.deployment import (
    Deployment,
)
from pipelines.pods import booked
from pipelines.submit import main
from pipelines.sweep import Sweep, parse_sweep
from tests.support.deployed import IMAGES, all_tasks, deployed, variables


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
        (["--list", "--cancel", "x"], "--list and --cancel cannot be followed together"),
        (["--endpoint", "http://[::1"], "http://[::1 is no address of an endpoint"),
        (["--endpoint", "http://a:b"], "http://a:b is no address of an endpoint"),
        (["--endpoint", "http://a?b=c"], "http://a?b=c is no address of an endpoint"),
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


def test_the_nodes_of_a_training_are_told_of_the_volume_with_base_models():
    _, containers, _ = deployed(model_cache={"claim": "models"}, nodes={"count": 2})
    told = json.loads(variables(containers, "sft")["DPO_NODES"])
    assert (told["model_cache"], told["model_cache_path"]) == ("models", "/cache")


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


def test_a_store_in_a_pods_own_files_is_refused_there(tmp_path, monkeypatch):
    """The form takes any text: the model was published, and gone with the pod."""
    values = package.defaults(package.load_package())
    values |= {"model": "tiny", "publish_store": (tmp_path / "a store").as_uri()}
    plan_run(values)
    mounts = {"/"}
    monkeypatch.setattr(os.path, "ismount", lambda place: str(place) in mounts)
    monkeypatch.setenv("KFP_POD_NAME", "run-1")
    with pytest.raises(ConfigError, match="a folder of this pod"):
        plan_run(values)
    # a volume
    mounts.add(str(tmp_path))
    plan_run(values)
