"""Registers a published version in Kubeflow's Model Registry, with its own client."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from dpo.errors import MissingDependency, StoreError, StoreUnavailable

_AUTHOR = "dpo-pipeline"
_FORMAT, _FORMAT_VERSION = "safetensors", "1"
_OURS = "minio://"


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
    try:
        client = _client(address)
        # the client fails where it is asked for a version of a model that there is not
        known = client.get_registered_model(name)
        made = client.get_model_version(name, version) if known else None
        if url.startswith(_OURS):
            # whoever serves models knows the other name alone
            url = f"s3://{url.removeprefix(_OURS)}"
        form = {"model_format_name": _FORMAT, "model_format_version": _FORMAT_VERSION}
        if made is None:
            client.register_model(name, url, version=version, metadata=dict(facts), **form)
        elif client.get_model_artifact(name, version) is None:
            # the one before ended between the version and its place; there is no public call
            client.async_runner(client._register_model_artifact(made, name, url, **form))
    except ImportError:
        raise MissingDependency(
            "the model is published; publish.registry needs the package model-registry",
            where="publish.registry",
            fix='pip install "dpo-pipeline[registry]"',
        ) from None
    except Exception as error:
        raise _problem(address, name, version, error) from None


def _client(address: str) -> Any:
    with warnings.catch_warnings():
        # it warns of a missing token, and of any port but 80
        warnings.simplefilter("ignore")
        from model_registry import ModelRegistry

        return ModelRegistry(address, author=_AUTHOR, log_level=logging.ERROR)


def _problem(address: str, name: str, version: str, error: Exception) -> StoreError:
    status = getattr(error, "status", None)
    kind = StoreError if status and status < 500 else StoreUnavailable
    fix = "publish again when the registry answers: no bytes of the model move then"
    if status == 404:
        fix = (
            "check the address; the installed client speaks v1 of the registry's REST service, and "
            "registries up to 0.3.14 v1alpha3: upgrade the registry, then publish again"
        )
    return kind(
        f"the model is published, but the registry did not take {name} {version[:12]}: "
        f"{_first_line(error)}",
        where=address,
        fix=fix,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
