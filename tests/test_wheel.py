"""What the wheel carries: configuration, templates, data and locks, so that it works anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's contents in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed, code):
    """With the wheel alone: isolated from this checkout, which is installed in place."""
    program = f"import sys; sys.path.insert(0, {str(installed)!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_shipped_configuration_is_found(installed):
    code = (
        "import dpo; from dpo.config.compose import compose; print(dpo.__file__); "
        "print(compose(['model=pythia28', 'loss=ipo']).config.model.name_or_path)"
    )
    place, name = run(installed, code).split()
    assert place.startswith(str(installed))
    assert name == "EleutherAI/pythia-2.8b"


def test_built_in_model_and_data_are_found(installed):
    code = (
        "from dpo.config.places import builtin; "
        "print((builtin('builtin:tiny') / 'config.json').is_file(), "
        "builtin('builtin:hh-harmless').exists())"
    )
    assert run(installed, code).split() == ["True", "True"]


def test_the_report_template_and_the_compiled_pipeline_travel_along(installed):
    names = {path.name for path in installed.rglob("*") if path.is_file()}
    assert {"report.html.j2", "preference_pipeline.yaml", "py.typed"} <= names


def test_ingest_runs_from_the_wheel(installed, tmp_path):
    code = (
        "from dpo.cli import main; "
        f"raise SystemExit(main(['ingest', 'model=tiny', 'output={tmp_path}/data']))"
    )
    run(installed, code)
    assert (tmp_path / "data/manifest.json").is_file()
