"""Each component alone: its compiled form loads and works in a pipeline of somebody else."""

import json
import sys

import pytest
from kfp import compiler, components, dsl

from components.fingerprint import fingerprint
from components.gate import gate
from components.ingest import ingest
from components.publish import publish
from components.sft import sft
from dpo.storage.given_model import read_model
from dpo.storage.manifest import read_manifest, staged, write_manifest
from dpo.storage.step import step as running
from pipelines import package
from pipelines.deployment import Images
from tests.train.conftest import prepared

__all__ = ["prepared"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("components")
    images = Images(data="r/python-data:1", train="r/python-train:1")
    package.write_components(where, package.placeholders(images))
    return where


def test_every_step_is_written_and_loads(folder):
    assert {path.stem for path in folder.glob("*.yaml")} == {*package.STEPS, package.SELECT}
    for path in folder.glob("*.yaml"):
        loaded = components.load_component_from_file(str(path))
        assert loaded.description, path.stem


def test_the_images_are_those_that_were_asked_for(folder):
    for step, image in (("ingest", "r/python-data:1"), ("sft", "r/python-train:1")):
        (executor,) = package.load_package(folder / f"{step}.yaml")[0]["deploymentSpec"][
            "executors"
        ].values()
        assert executor["container"]["image"] == image


def test_a_component_runs_in_another_pipeline(
    folder, kfp_processes, tmp_path, golden_dir, monkeypatch
):
    ingest = components.load_component_from_file(str(folder / "ingest.yaml"))
    settings = {
        "datasets": [str(golden_dir / "pairs.jsonl")],
        "model": {"name_or_path": "builtin:tiny"},
    }

    @dsl.pipeline(name="somebody-elses")
    def theirs(settings: str):
        ingest(settings=settings)

    compiler.Compiler().compile(theirs, str(tmp_path / "theirs.yaml"))
    monkeypatch.setenv("DPO_PROGRESS_FILE", str(tmp_path / "events.jsonl"))
    components.load_component_from_file(str(tmp_path / "theirs.yaml"))(
        settings=json.dumps(settings)
    )
    (manifest,) = kfp_processes.glob("*/ingest/pairs/manifest.json")
    assert read_manifest(manifest.parent, stage="ingest").details["metrics"]["pairs"] == 64


def test_the_gate_alone_needs_neither_a_run_nor_a_store(tmp_path, capsys):
    with staged(tmp_path / "evaluation") as judged:
        accuracy = {"value": 0.9, "low": 0.8, "high": 1.0}
        figures = {"after": {"reward_accuracy": accuracy}, "held_out": "pairs", "policy": {}}
        (judged / "evaluation.json").write_text(json.dumps(figures))
        (judged / "report.html").write_text("<p>figures</p>")
        write_manifest(judged, "evaluate")
    places = {
        name: dsl.Artifact(name, str(tmp_path / name))
        for name in ("evaluation", "verdict", "report")
    }
    assert gate.python_func(**places) is True
    assert json.loads((tmp_path / "verdict/verdict.json").read_text())["approved"]
    assert "no run_id is given" in capsys.readouterr().err


def test_components_take_files_and_models_that_others_made(
    folder, kfp_processes, tmp_path, tiny_model, monkeypatch
):
    """A file of pairs and a Hugging Face folder; what is optional is left out."""
    ingest, reference = (
        components.load_component_from_file(str(folder / f"{step}.yaml"))
        for step in ("ingest", "reference")
    )

    @dsl.component(base_image="python", install_kfp_package=False)
    def make(rows: dsl.Output[dsl.Dataset], model: dsl.Output[dsl.Model], source: str):
        import json
        import shutil
        from pathlib import Path

        shutil.copytree(source, model.path)
        lines = [
            json.dumps({"prompt": f"Say {i}:", "chosen": f" yes {i}", "rejected": f" no {i}"})
            for i in range(30)
        ]
        Path(rows.path).write_text("\n".join(lines))

    limits = '{"max_length": 64, "max_prompt_length": 32}'

    @dsl.pipeline(name="theirs")
    def theirs(source: str):
        made = make(source=source)
        pairs = ingest(rows=made.outputs["rows"], settings=limits).outputs["pairs"]
        reference(pairs=pairs, model=made.outputs["model"], settings=limits)

    monkeypatch.setenv("DPO_PROGRESS_FILE", str(tmp_path / "events.jsonl"))
    theirs(source=str(tiny_model))
    (scored,) = kfp_processes.glob("*/reference/log_probs")
    manifest = read_manifest(scored, stage="reference")
    assert manifest.inputs["model"] == read_model(tiny_model).content_hash
    assert manifest.details["pairs"] == 30
    (noted,) = kfp_processes.glob("*/reference/executor_output.json")
    metadata = json.loads(noted.read_text())["artifacts"]["log_probs"]["artifacts"][0]["metadata"]
    assert metadata == {"step": "reference", "content_hash": manifest.content_hash}


@pytest.mark.parametrize(
    ("step", "optional"),
    [
        ("ingest", {"rows"}),
        ("sft", {"model"}),
        ("reference", {"model"}),
        ("preference", {"model", "log_probs"}),
        ("evaluate", {"log_probs"}),
    ],
)
def test_optional_inputs_are_declared_so(folder, step, optional):
    spec = package.load_package(folder / f"{step}.yaml")[0]
    inputs = spec["components"][f"comp-{step}"]["inputDefinitions"]
    found = {name for name, item in inputs["artifacts"].items() if item.get("isOptional")}
    assert found == optional
    assert all(item.get("isOptional") for item in inputs["parameters"].values())


def test_a_message_says_which_input_of_the_component_is_meant(tmp_path, capsys):
    """Nobody typed the path of an artifact: the backend gave it."""
    for name in ("policy", "evaluation", "verdict"):
        (tmp_path / name).mkdir()
    places = {
        name: dsl.Artifact(name, str(tmp_path / name))
        for name in ("policy", "evaluation", "verdict", "published", "metrics")
    }
    with pytest.raises(SystemExit):
        publish.python_func(**places)
    assert f"where: input policy: {tmp_path / 'policy'}" in capsys.readouterr().err


def test_rows_and_settings_do_not_both_name_the_data(tmp_path, capsys):
    places = {
        name: dsl.Artifact(name, str(tmp_path / name))
        for name in ("pairs", "data_report", "metrics", "rows")
    }
    with pytest.raises(SystemExit):
        ingest.python_func(**places, settings='{"datasets": ["hh_sample"]}')
    assert "both the input rows and datasets in the settings" in capsys.readouterr().err


@pytest.mark.parametrize("settings", ["{}", '{"model": {"policy_dtype": "bfloat16"}}'])
def test_a_step_that_nobody_gave_a_model_trains_no_toy(prepared, tmp_path, capsys, settings):
    places = {name: dsl.Artifact(name, str(tmp_path / name)) for name in ("checkpoint", "metrics")}
    pairs = dsl.Artifact("pairs", str(prepared.data))
    with pytest.raises(SystemExit):
        sft.python_func(pairs=pairs, **places, settings=settings)
    assert "no model is given" in capsys.readouterr().err


def test_a_model_of_others_is_trained_by_defaults(prepared, tmp_path, tiny_model):
    """SFT on the preferred answers of 64 tokens; no other model is recorded than the one given."""
    places = {
        "checkpoint": dsl.Model("checkpoint", str(tmp_path / "checkpoint")),
        "metrics": dsl.Metrics("metrics", str(tmp_path / "metrics")),
    }
    given = {"pairs": str(prepared.data), "model": str(tiny_model)}
    artifacts = {name: dsl.Artifact(name, path) for name, path in given.items()}
    limits = '{"max_length": 64, "max_prompt_length": 32, "n_examples": 4}'
    sft.python_func(**artifacts, **places, settings=limits)
    manifest = read_manifest(tmp_path / "checkpoint", stage="sft")
    assert manifest.inputs["base"] == read_model(tiny_model).content_hash
    assert manifest.settings["model"]["name_or_path"] == ""


def test_an_image_of_other_code_says_so_first(monkeypatch, capsys):
    """Other code may lack what the package's first step imports, and its settings."""
    monkeypatch.setenv("DPO_EXPECTED_SOURCE", "0" * 64)
    for gone in ("dpo.plan.booked", "dpo.publish.runs"):
        monkeypatch.setitem(sys.modules, gone, None)
    given = package.defaults(package.load_package())
    with pytest.raises(SystemExit):
        fingerprint.python_func(**given)
    assert "built from other code than the pipeline that runs in it" in capsys.readouterr().err


def test_a_setting_that_only_other_code_knows_is_no_mistake_of_the_user(capsys):
    """Images of two commits: what is wrong are these, not a key that nobody typed."""
    settings = '{"of_tomorrow": 1}'
    with pytest.raises(SystemExit), running("gate", settings, json.dumps({"code": "0" * 64})):
        pass
    assert "the code of step gate changed after the run was planned" in capsys.readouterr().err
    with pytest.raises(SystemExit), running("gate", settings):
        pass
    assert "of_tomorrow" in capsys.readouterr().err
