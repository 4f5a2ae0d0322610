"""The compiled pipeline in the repository: current, complete, documented, cached where right."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import yaml

from components import images
from dpo.config.parameters import OVERRIDES, PARAMETERS, STARTS
from dpo.errors import ConfigError, PipelineError
from pipelines import package, submit
from pipelines.preference import preference_pipeline
from pipelines.sweep import Sweep

ROOT = Path(package.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def documents():
    return package.load_package()


def tasks(documents):
    spec = documents[0]
    found = {}
    for component in [spec["root"], *spec["components"].values()]:
        found.update(component.get("dag", {}).get("tasks", {}))
    return found


def test_the_compiled_package_is_that_of_the_sources(tmp_path):
    package.compile_pipeline(tmp_path / "fresh.yaml")
    assert (tmp_path / "fresh.yaml").read_bytes() == package.PACKAGE.read_bytes()


def test_check_reports_drift(monkeypatch, tmp_path, capsys):
    stale = tmp_path / "stale.yaml"
    stale.write_text(package.PACKAGE.read_text() + "# edited by hand\n")
    monkeypatch.setattr(package, "PACKAGE", stale)
    assert package.main(["--check"]) == 1
    assert "run `make pipeline`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--deployment", "gpu", "--nodes", "2"], "--deployment is of a package for a cluster"),
        (["--nodes", "2"], "--nodes is of a package for a cluster"),
        (["--ingest-shards", "3"], "--ingest-shards is of"),
        (["--check", "--preset", "full"], "--check compares only"),
    ],
)
def test_options_of_a_package_for_a_cluster_leave_the_repository_alone(arguments, words, capsys):
    before = package.PACKAGE.stat().st_mtime_ns
    assert package.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert package.PACKAGE.stat().st_mtime_ns == before


def test_a_package_that_cannot_be_written_is_one_message(tmp_path, capsys):
    images = ["--image", "data=r/d:1", "--image", "train=r/t:1"]
    assert package.main(["--output", str(tmp_path), *images]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Is a directory")
    assert str(tmp_path) in said


def test_a_package_does_not_publish_into_a_folder_of_one_pod(tmp_path, capsys):
    """A run that was started in the form ended well, and its model was gone with the pod."""
    target = tmp_path / "package.yaml"
    command = ["--output", str(target), "--deployment", "cpu", "--image", "data=d:1"]
    command += ["--image", "train=t:1", "--store", "file:///shared/models"]
    assert package.main(command) == 2
    assert "is a folder of each pod's own" in capsys.readouterr().err
    assert not target.exists()
    volume = "model_cache={claim: models, mount_path: /shared}"
    assert package.main([*command, "--deploy", volume]) == 0


def test_every_step_is_there(documents):
    steps = {name for name in tasks(documents) if not name.startswith(("condition", "exit"))}
    assert steps == set(package.STEPS)


def test_the_end_of_a_run_comes_after_failures_too_and_is_never_cached(documents):
    root = documents[0]["root"]["dag"]["tasks"]
    assert set(root) == {"exit-handler-1", "finish"}
    end = root["finish"]
    assert end["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert not end.get("cachingOptions", {}).get("enableCache")
    # kfp.local takes a task for an exit task only when it asks for the final status
    assert "taskFinalStatus" in end["inputs"]["parameters"]["status"]


@pytest.mark.parametrize("sweep", [(), ('["loss.beta=0.1"]', '["loss.beta=0.2"]')])
def test_what_is_looked_up_bears_the_name_of_its_key(sweep):
    """Drivers found producers by the name shown: kubeflow/pipelines#11173, #13239 (loops)."""
    found = tasks(package.local_package(Sweep(sweep), n_shards=2))
    names = {key: task["taskInfo"]["name"] for key, task in found.items()}
    # nothing reads an output of the condition
    (condition,) = [key for key in names if key.startswith("condition")]
    assert names.pop(condition) == "approved"
    assert names == {key: key for key in names}
    assert sum(key.startswith("for-loop") for key in names) == (2 if sweep else 1)


def test_no_setting_of_a_pod_is_a_parameter(documents):
    """One inside an exit handler or a condition fails in Kubeflow's driver, and none runs here."""
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        container = {k: v for k, v in executor["container"].items() if k not in ("args", "command")}
        assert "pipelinechannel" not in str(container)


def test_fingerprint_gate_and_publish_are_never_cached(documents):
    cached = {
        name
        for name, task in tasks(documents).items()
        if task.get("cachingOptions", {}).get("enableCache")
    }
    assert cached == {"ingest", "sft", "reference", "preference", "evaluate"}


def test_the_only_condition_compares_a_boolean_that_the_gate_computed(documents):
    conditions = [
        task["triggerPolicy"]["condition"]
        for task in tasks(documents).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    assert conditions == ["inputs.parameter_values['pipelinechannel--gate-Output'] == true"]


def test_every_parameter_is_explained_in_the_form(documents):
    texts = package.help_texts(documents)
    assert [name for name, text in texts.items() if len(text) < 15] == []


def test_parameters_of_form_table_and_first_step_are_the_same(documents):
    names = set(PARAMETERS) | set(OVERRIDES) | set(STARTS)
    assert set(package.defaults(documents)) == names
    spec = documents[0]["components"]["comp-fingerprint"]["inputDefinitions"]["parameters"]
    assert set(spec) == names | {"run_id"}


def test_defaults_of_the_form_are_the_preset_quick(documents):
    quick = yaml.safe_load((ROOT / "config/presets/quick.yaml").read_text())
    defaults = package.defaults(documents)
    assert {name: defaults[name] for name in quick} == quick


def test_integers_stay_integers(documents):
    assert isinstance(package.defaults(documents)["seed"], int)


def test_images_are_placeholders_until_a_package_is_made(documents):
    used = {
        executor["container"]["image"]
        for executor in documents[0]["deploymentSpec"]["executors"].values()
    }
    assert used == {images.DATA_IMAGE, images.TRAIN_IMAGE}
    package.set_images(documents, {images.DATA_IMAGE: "registry/data@sha256:1"})
    used = {
        executor["container"]["image"]
        for executor in documents[0]["deploymentSpec"]["executors"].values()
    }
    assert used == {"registry/data@sha256:1", images.TRAIN_IMAGE}


def test_no_step_installs_packages_in_its_pod(documents):
    for name, executor in documents[0]["deploymentSpec"]["executors"].items():
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_uncached_steps_are_switched_off_wherever_they_are():
    documents = package.load_package()
    package.set_uncached(documents, ["sft", "publish"])
    cached = {
        name
        for name, task in tasks(documents).items()
        if task.get("cachingOptions", {}).get("enableCache")
    }
    assert cached == {"ingest", "reference", "preference", "evaluate"}


def test_an_unknown_step_names_the_choices():
    with pytest.raises(ConfigError, match="no step is called stf") as caught:
        package.set_uncached(package.load_package(), ["stf"])
    assert "reference" in str(caught.value)


def test_the_parameters_are_listed_for_a_program_too(capsys):
    assert submit.main(["--list", "--output", "json"]) == 0
    (told,) = json.loads(capsys.readouterr().out).values()
    assert told["sft_warmup_steps"] == {
        "default": 1,
        "meaning": "Optimiser steps until sft_lr is reached.",
    }


@pytest.mark.parametrize(
    "option",
    [
        *("store", "endpoint", "namespace", "experiment", "run-name"),
        *("runs-dir", "deployment", "images", "package"),
    ],
)
def test_an_empty_value_is_a_variable_that_is_not_set(option, capsys):
    assert submit.main([f"--{option}", "", "--list"]) == 2
    assert f"argument --{option}: the value is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rerun", ""], "argument --rerun: no step is named"),
        (["--rerun", ", "], "argument --rerun: no step is named"),
        (["explain", ""], "argument run_id: the value is empty"),
        (["explain", "--store", ""], "argument --store: the value is empty"),
        (["explain", "--runs-dir", ""], "argument --runs-dir: the value is empty"),
    ],
)
def test_nor_is_an_empty_value_another_command(arguments, words, capsys):
    assert submit.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "- just\n- a list\n", "a: [unclosed"])
def test_what_is_no_package_is_refused(tmp_path, text):
    path = tmp_path / "package.yaml"
    path.write_text(text)
    with pytest.raises(PipelineError, match="make pipeline"):
        package.load_package(path)


@pytest.mark.parametrize("path", sorted((ROOT / "components").glob("*.py")), ids=lambda p: p.stem)
def test_components_stay_thin(path):
    """kfp serialises the body alone: imports inside, no module names in defaults, few lines."""
    source = path.read_text()
    assert "from __future__" not in source
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        body = node.body[1:]
        assert len(body) <= 8, "a component calls into dpo, it does not compute"
        assert ast.get_docstring(node)
        for default in node.args.defaults:
            assert isinstance(default, ast.Constant), "kfp evaluates defaults in the pod"


def test_the_pipeline_documents_each_of_its_parameters():
    documentation = inspect.getdoc(preference_pipeline.pipeline_func)
    for name in preference_pipeline.pipeline_spec.root.input_definitions.parameters:
        assert f"    {name}: " in documentation


def test_a_checkout_that_cannot_be_written_to_is_one_message(tmp_path, monkeypatch, capsys):
    # nobody may write into a file as into a folder, not even root
    (tmp_path / "file").touch()
    monkeypatch.setattr(package, "PACKAGE", tmp_path / "file" / "preference_pipeline.yaml")
    assert package.main([]) == 1
    told = capsys.readouterr().err
    assert f"where: {tmp_path}/file/preference_pipeline.yaml" in told
    assert "fix:" in told
