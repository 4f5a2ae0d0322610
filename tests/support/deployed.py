"""Packages for a cluster, taken apart."""

from pipelines import package
from pipelines.deployment import (
    Deployment,
)

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


def variables(containers, step):
    return {item["name"]: item["value"] for item in containers[f"exec-{step}"].get("env", [])}
