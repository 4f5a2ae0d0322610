"""Ingest as one task or as several: how many is decided when the package is compiled.

A number of tasks cannot be a pipeline parameter, for the loop's items are written into the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dpo.errors import ConfigError

SHARD_STEP = "ingest-shard"
_MOST_SHARDS = 256
_N_SHARDS = ContextVar("n_shards", default=1)


@contextmanager
def ingest_shards(number: int) -> Iterator[None]:
    """Pipelines that are compiled inside have so many tasks that read the sources.

    Raises:
        ConfigError: fewer than one, or more than there is any use for.
    """
    if not 1 <= number <= _MOST_SHARDS:
        raise ConfigError(
            f"--ingest-shards {number} is not between 1 and {_MOST_SHARDS}",
            fix="1 reads the sources in one task; more share the reading",
        )
    token = _N_SHARDS.set(number)
    try:
        yield
    finally:
        _N_SHARDS.reset(token)


def ingest_tasks(*, settings: Any, fingerprint: Any, data_uri: Any) -> Any:
    """The task ``ingest``, after the tasks of its shards where there are some.

    Args:
        settings: Of ingest.
        fingerprint: Of ingest.
        data_uri: An earlier output of ingest to use instead; there is nothing to share then.
    """
    from kfp import dsl

    from components.ingest import ingest
    from components.ingest_merge import ingest as merge
    from components.ingest_shard import ingest_shard

    number = _N_SHARDS.get()
    if number < 2:
        return ingest(settings=settings, fingerprint=fingerprint, data_uri=data_uri)
    names = [f"{index}/{number}" for index in range(1, number + 1)]
    # no name: dsl.Collected finds the loop by its key (kubeflow/pipelines#13239)
    with dsl.ParallelFor(items=names) as name:
        shard = ingest_shard(
            shard=name, settings=settings, fingerprint=fingerprint, data_uri=data_uri
        )
    return merge(
        settings=settings,
        fingerprint=fingerprint,
        shards=dsl.Collected(shard.outputs["checked"]),
        data_uri=data_uri,
    )
