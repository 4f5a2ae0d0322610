"""The alerts, tried by Prometheus' own tool on series made for it."""

import shutil
import subprocess

import pytest
import yaml

from tests.support.checkout import ROOT

RULES = ROOT / "manifests/components/monitoring"


def groups():
    return yaml.safe_load((RULES / "rules.yaml").read_text())["spec"]


def test_every_alert_says_what_it_means_and_what_to_do():
    for group in groups()["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
            assert rule["labels"]["severity"] in ("info", "warning", "critical")


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool was not found: apt-get install prometheus")
    (tmp_path / "groups.yaml").write_text(yaml.safe_dump(groups()))
    shutil.copyfile(RULES / "rules.test.yaml", tmp_path / "rules.test.yaml")
    done = subprocess.run(
        [tool, "test", "rules", "rules.test.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
