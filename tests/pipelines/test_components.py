"""Each component alone: its compiled form loads and works in a pipeline of somebody else."""

import json

import pytest
from kfp import compiler, components, dsl

from components.gate import gate
from dpo.storage.manifest import read_manifest, staged, write_manifest
from pipelines import package
from pipelines.deployment import Images


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
