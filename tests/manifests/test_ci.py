"""The snippets for CI name options and exit codes that ``submit.py`` has."""

import re
import shlex

import pytest
import yaml

from pipelines import submit
from pipelines.deployment import load_deployment
from tests.support.checkout import ROOT

CI = ROOT / "manifests" / "ci"


def script(name):
    values = yaml.safe_load((CI / name).read_text())
    if name == "gitlab.yaml":
        return "\n".join(values["train"]["script"])
    (step,) = [s for s in values["jobs"]["train"]["steps"] if "submit.py" in s.get("run", "")]
    return step["run"]


@pytest.mark.parametrize("name", ["github.yaml", "gitlab.yaml"])
def test_the_command_is_one_that_submit_takes(name):
    text = script(name).replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if "pipelines/submit.py" in line]
    words = shlex.split(line.partition(" > ")[0])
    options = submit.parser().parse_args(words[2:])
    assert options.wait
    assert options.output == "json"
    assert options.deployment == "gpu"
    settings = load_deployment(options.deployment, options.deploy[:2])
    # of the store in the command
    assert settings.store_secret
    assert "S3_ENDPOINT" in settings.environment


@pytest.mark.parametrize("name", ["github.yaml", "gitlab.yaml"])
def test_packages_are_installed_from_the_lock_file_that_has_no_torch(name):
    path = re.search(r"--require-hashes -r (\S+)", (CI / name).read_text())[1]
    assert not re.search(r"^torch==", (ROOT / path).read_text(), re.MULTILINE)


def test_the_codes_are_those_of_the_documentation():
    page = (ROOT / "manifests" / "README.md").read_text()
    table = page.partition("## From CI")[2].partition("## ")[0]
    assert re.findall(r"^\| (\d+) \|", table, re.MULTILINE) == ["0", "1", "2", "3", "4", "5", "130"]
    assert "3: the gate refused" in (CI / "github.yaml").read_text()
    values = yaml.safe_load((CI / "gitlab.yaml").read_text())
    assert values["train"]["allow_failure"] == {"exit_codes": [3]}
