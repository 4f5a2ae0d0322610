"""Code fingerprints follow imports: what a step does not import cannot make it run again."""

import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import dpo
from dpo.config.models import ModelConfig
from dpo.config.places import builtin
from dpo.storage import base_model, fingerprint
from dpo.storage.base_model import model_fingerprint
from dpo.storage.fingerprint import ENTRY_MODULES, imported_modules, path_fingerprint

PACKAGE = Path(dpo.__file__).parent


@pytest.mark.parametrize("stage", ENTRY_MODULES)
def test_entry_modules_exist(stage):
    assert ENTRY_MODULES[stage] in imported_modules(ENTRY_MODULES[stage])


def test_training_does_not_depend_on_evaluation_or_publishing():
    for stage in ("sft", "reference", "preference"):
        modules = imported_modules(ENTRY_MODULES[stage])
        assert not [name for name in modules if name.startswith(("dpo.evaluate", "dpo.publish"))]


def test_training_does_not_depend_on_how_sources_are_read():
    modules = imported_modules(ENTRY_MODULES["preference"])
    assert "dpo.data.stage" not in modules
    assert not [name for name in modules if name.startswith("dpo.data.sources")]


def test_gate_and_publish_need_no_torch():
    for stage in ("gate", "publish", "ingest"):
        command = f"import sys, {ENTRY_MODULES[stage]}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0, stage


@pytest.fixture
def copy(tmp_path):
    """A copy of the package whose sources may be edited."""
    shutil.copytree(PACKAGE, tmp_path / "dpo", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def fingerprints(root):
    code = (
        "from dpo.storage.fingerprint import code_fingerprint, ENTRY_MODULES\n"
        "print(*(code_fingerprint(stage) for stage in ENTRY_MODULES))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    return dict(zip(ENTRY_MODULES, result.stdout.split(), strict=True))


@pytest.mark.parametrize(
    ("edited", "changed"),
    [
        ("train/stage.py", {"sft", "preference"}),
        ("evaluate/stage.py", {"evaluate"}),
        ("data/stage.py", {"ingest"}),
        ("publish/stage.py", {"publish"}),
        ("errors.py", set(ENTRY_MODULES)),
        # what a step fills in makes its output as its code does
        ("evaluate/templates/report.html.j2", {"evaluate"}),
        ("data/templates/data_report.html.j2", {"ingest"}),
        ("data/templates/chat/llama3.jinja", {"ingest"}),
    ],
)
def test_an_edited_line_changes_the_steps_that_import_it(copy, edited, changed):
    before = fingerprints(copy)
    with (copy / "dpo" / edited).open("a") as file:
        file.write("\n# one more line\n")
    after = fingerprints(copy)
    assert {stage for stage in ENTRY_MODULES if before[stage] != after[stage]} == changed


def test_every_template_of_the_package_is_in_a_fingerprint():
    found = [path for pattern in ("*.j2", "*.jinja") for path in PACKAGE.rglob(pattern)]
    known = [path for pattern in fingerprint._TEMPLATES.values() for path in PACKAGE.glob(pattern)]
    assert found
    assert sorted(found) == sorted(known)


def test_equal_folders_have_equal_fingerprints(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("same")
    assert path_fingerprint(tmp_path / "one") == path_fingerprint(tmp_path / "two")
    (tmp_path / "two" / "sub" / "file").write_text("other")
    assert path_fingerprint(tmp_path / "one") != path_fingerprint(tmp_path / "two")


def test_what_tools_keep_in_a_models_folder_is_none_of_the_model(tmp_path):
    """``git status`` writes .git/index, and the hub's client the time of a download."""
    folder = tmp_path / ".cache/model"
    shutil.copytree(builtin("builtin:tiny"), folder)
    before = model_fingerprint(ModelConfig(name_or_path=str(folder)))
    assert before == model_fingerprint(ModelConfig(name_or_path="builtin:tiny"))
    for name in (
        ".git/index",
        ".cache/huggingface/download/config.json.metadata",
        ".gitattributes",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1764201234.5")
    assert model_fingerprint(ModelConfig(name_or_path=str(folder))) == before
    (folder / "extra.json").write_text("{}")
    assert model_fingerprint(ModelConfig(name_or_path=str(folder))) != before


def test_a_tokenizer_of_another_model_is_in_the_fingerprint(tmp_path, monkeypatch):
    """Of a model of the hub too, and with the commit where the tokenizer is there."""
    commits = {("org/model", "v1"): "c1", ("org/model", None): "c2", ("org/words", None): "c3"}
    monkeypatch.setattr(
        base_model, "_hub_commit", lambda model: commits[model.name_or_path, model.revision]
    )
    shutil.copytree(builtin("builtin:tiny"), tmp_path / "words")
    here = {"tokenizer_name_or_path": str(tmp_path / "words")}
    print_ = model_fingerprint(ModelConfig(name_or_path=str(tmp_path / "words")))
    found = [
        model_fingerprint(ModelConfig(name_or_path="org/model", **given))
        for given in ({}, here, {"tokenizer_name_or_path": "org/words", "revision": "v1"})
    ]
    assert found == ["org/model@c2", f"org/model@c2+{print_}", "org/model@c1+org/words@c3"]
    same = {"tokenizer_name_or_path": "org/model", "revision": "v1"}
    assert model_fingerprint(ModelConfig(name_or_path="org/model", **same)) == "org/model@c1"
    (tmp_path / "words/tokenizer_config.json").write_text("{}")
    assert model_fingerprint(ModelConfig(name_or_path="org/model", **here)) != found[1]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_without_a_network_the_commit_is_that_of_the_hubs_cache(file, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    found = {file: str(tmp_path / "snapshots/c0ffee" / file)}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda _, name, **__: found.get(name)
    )
    assert model_fingerprint(ModelConfig(name_or_path="org/words")) == "org/words@c0ffee"
