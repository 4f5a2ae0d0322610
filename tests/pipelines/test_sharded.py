"""Ingest as several tasks: compiled into the package, run by kfp, and equal to one task."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from dpo.config.models import ModelConfig
from dpo.config.schema import RunConfig
from dpo.config.sources import SourceConfig
from dpo.config.stages import stage_json
from dpo.data.stage import run_ingest
from dpo.errors import ConfigError
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.manifest import read_manifest, sha256_file
from pipelines import submit
from pipelines.package import load_package, local_package, main
from pipelines.run import package_for
from pipelines.sharded import ingest_shards, ingest_tasks
from pipelines.sweep import NO_SWEEP
from tests.data.conftest import good_row


def test_the_package_has_a_loop_of_shards() -> None:
    spec = local_package(NO_SWEEP, 3)[0]
    (steps,) = [
        component["dag"]["tasks"]
        for component in spec["components"].values()
        if "ingest" in component.get("dag", {}).get("tasks", {})
    ]
    (loop,) = [task for name, task in steps.items() if name.startswith("for-loop")]
    items = json.loads(loop["parameterIterator"]["items"]["raw"])
    assert items == ["1/3", "2/3", "3/3"]
    inner = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"]
    assert list(inner) == ["ingest-shard"]
    # the steps after it find what they know
    assert steps["sft"]["inputs"]["artifacts"]["pairs"]["taskOutputArtifact"] == {
        "outputArtifactKey": "pairs",
        "producerTask": "ingest",
    }
    assert "ingest-shard" not in json.dumps(local_package(NO_SWEEP, 1)[0])


def test_a_package_for_a_cluster_gives_shards_the_settings_of_ingest(tmp_path: Path) -> None:
    images = tmp_path / "images.json"
    data, train = (
        f"registry.example/{name}@sha256:{digit * 64}"
        for name, digit in (("data", "1"), ("train", "2"))
    )
    images.write_text(json.dumps({"data": data, "train": train}))
    target = tmp_path / "package.yaml"
    words = ["--output", str(target), "--deployment", "cpu", "--images", str(images)]
    assert main([*words, "--ingest-shards", "2"]) == 0
    executors = load_package(target)[0]["deploymentSpec"]["executors"]
    shard, whole = (executors[f"exec-{name}"]["container"] for name in ("ingest-shard", "ingest"))
    assert shard["image"] == data
    assert shard["resources"] == whole["resources"]


def test_kfp_runs_the_shards_and_the_result_is_one_tasks(
    kfp_processes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    many = tmp_path / "many"
    many.mkdir()
    for name in range(3):
        rows = [good_row(10 * name + number) for number in range(8)]
        (many / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig(
        datasets=["many"],
        sources={"many": SourceConfig(path=str(many))},
        model=ModelConfig(name_or_path="builtin:tiny"),
    )
    settings = stage_json(config, "ingest")
    code = code_fingerprint("ingest")
    fingerprint = json.dumps({"code": code})

    with ingest_shards(2):

        @dsl.pipeline(name="sharded-ingest")
        def pipeline() -> None:
            ingest_tasks(settings=settings, fingerprint=fingerprint, data_uri="")

    pipeline()
    run_ingest(config, tmp_path / "one", code=code)
    (merged,) = kfp_processes.glob("*/ingest/pairs")

    def hashes(folder: Path) -> dict[str, Any]:
        # the manifest also says which image and commit made it
        found = {path.name: sha256_file(path) for path in folder.iterdir()}
        return found | {"manifest.json": read_manifest(folder, stage="ingest").content_hash}

    assert hashes(merged) == hashes(tmp_path / "one")


@pytest.mark.parametrize("number", [0, -1, 1000])
def test_a_number_of_shards_that_cannot_be_is_refused(number: int) -> None:
    with pytest.raises(ConfigError, match=f"--ingest-shards {number} is not between 1 and 256"):
        package_for("processes", n_shards=number)


def test_submit_runs_a_package_with_shards(tmp_path: Path) -> None:
    target = tmp_path / "package.yaml"
    pairs = Path(__file__).parents[1] / "golden/pairs.jsonl"
    words = ["--set", "model=tiny", "--set", f"datasets=[{pairs}]", "--runs-dir", str(tmp_path)]
    arguments = ["--local", *words, "--ingest-shards", "2", "--dry-run", "--package", str(target)]
    assert submit.main(arguments) == 0
    assert '["1/2", "2/2"]' in target.read_text(encoding="utf-8")
