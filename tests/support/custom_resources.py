"""Custom resource definitions for tests on a real Kubernetes API server.

``trainer_definitions`` makes those of Kubeflow Trainer from the typed models of
``kubeflow-trainer-api``, so the API server refuses fields that the models do not know.
``stored_as_given`` makes one for kinds whose schema is not at hand: stored without a look at them.
"""

from __future__ import annotations

from typing import Any

TRAINER_GROUP, TRAINER_VERSION = "trainer.kubeflow.org", "v1alpha1"
# what the API server itself knows about every object
_OWN = ("apiVersion", "kind", "metadata")
_INT_OR_STRING = ("IntOrString", "Quantity")
_KEPT = ("type", "required", "enum", "minimum", "maximum", "pattern", "maxLength", "minLength")


def trainer_definitions() -> list[dict[str, Any]]:
    """TrainJob, TrainingRuntime and ClusterTrainingRuntime, with status subresource."""
    from kubeflow_trainer_api import models

    scopes = {
        "TrainJob": "Namespaced",
        "TrainingRuntime": "Namespaced",
        "ClusterTrainingRuntime": "Cluster",
    }
    found = []
    for kind, scope in scopes.items():
        model = getattr(models, f"Trainer{TRAINER_VERSION.capitalize()}{kind}")
        document = model.model_json_schema(by_alias=True)
        schema = structural(document, document["$defs"], without=_OWN)
        found.append(definition(TRAINER_GROUP, TRAINER_VERSION, kind, scope, schema, status=True))
    return found


def stored_as_given(group: str, version: str, kind: str, scope: str) -> dict[str, Any]:
    """A definition that takes anything."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return definition(group, version, kind, scope, anything)


def definition(
    group: str, version: str, kind: str, scope: str, schema: dict[str, Any], *, status: bool = False
) -> dict[str, Any]:
    """A CustomResourceDefinition with one version."""
    plural = f"{kind.lower()}es" if kind.endswith("s") else f"{kind.lower()}s"
    served: dict[str, Any] = {
        "name": version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
    }
    if status:
        served["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
            },
            "versions": [served],
        },
    }


def structural(
    node: dict[str, Any], definitions: dict[str, Any], *, without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A JSON Schema of pydantic as Kubernetes wants it: no references, no alternatives.

    Args:
        node: The schema.
        definitions: What its references name.
        without: Properties of ``node`` to leave out.
    """
    if reference := node.get("$ref"):
        name = reference.rpartition("/")[2]
        if name.endswith(_INT_OR_STRING):
            return {"x-kubernetes-int-or-string": True}
        return structural(definitions[name], definitions)
    choices = [c for c in node.get("anyOf", node.get("oneOf", [])) if c.get("type") != "null"]
    if choices:
        return structural(choices[0], definitions) if len(choices) == 1 else _anything()
    found = {key: node[key] for key in _KEPT if key in node}
    if found.get("type") == "array":
        found["items"] = structural(node.get("items", {}), definitions)
    elif found.get("type") == "object":
        _object(found, node, definitions, without)
    elif "type" not in found:
        return _anything()
    return found


def _object(
    found: dict[str, Any],
    node: dict[str, Any],
    definitions: dict[str, Any],
    without: tuple[str, ...],
) -> None:
    further = node.get("additionalProperties")
    if properties := node.get("properties"):
        found["properties"] = {
            name: structural(value, definitions)
            for name, value in properties.items()
            if name not in without
        }
        if required := [name for name in node.get("required", []) if name not in without]:
            found["required"] = required
    elif isinstance(further, dict) and further:
        found["additionalProperties"] = structural(further, definitions)
    else:
        found["x-kubernetes-preserve-unknown-fields"] = True


def _anything() -> dict[str, Any]:
    return {"x-kubernetes-preserve-unknown-fields": True}
