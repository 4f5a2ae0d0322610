"""Registers a published version in Kubeflow's Model Registry, with its own client."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from dpo.errors import MissingDependency, StoreError, StoreUnavailable

_AUTHOR = "dpo-pipeline"
_FORMAT, _FORMAT_VERSION = "safetensors", "1"


def register(
    address: str, name: str, version: str, url: str, facts: Mapping[str, str | float]
) -> None:
    """Register a version; one that is registered already is left as it is.

    Args:
        address: ``http://host:port`` of the registry's REST service. The token is read from
            the file that ``KF_PIPELINES_SA_TOKEN_PATH`` names, as the registry's client does.
        name: Name of the model.
        version: Its content hash.
        url: Where it is published.
        facts: Kept with the version.

    Raises:
        MissingDependency: the package ``model-registry`` is not installed.
        StoreError: the registry refuses or does not answer; the model is published all the same.
    """
    client = _client(address)
    try:
        if client.get_model_version(name, version) is not None:
            return
        client.register_model(
            name,
            url,
            version=version,
            model_format_name=_FORMAT,
            model_format_version=_FORMAT_VERSION,
            metadata=dict(facts),
        )
    except Exception as error:
        raise _problem(address, name, version, error) from None


def _client(address: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from model_registry import ModelRegistry

            return ModelRegistry(address, author=_AUTHOR)
    except ImportError:
        raise MissingDependency(
            "publish.registry needs the package model-registry",
            where="publish.registry",
            fix='pip install "dpo-pipeline[registry]"',
        ) from None
    except Exception as error:
        raise StoreError(
            f"the model registry cannot be used: {_first_line(error)}", where=address
        ) from None


def _problem(address: str, name: str, version: str, error: Exception) -> StoreError:
    status = getattr(error, "status", None)
    kind = StoreError if status and status < 500 else StoreUnavailable
    return kind(
        f"the model is published, but the registry did not take {name} {version[:12]}: "
        f"{_first_line(error)}",
        where=address,
        fix="publish again when the registry answers: no bytes of the model move then",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
