"""Starts the processes of one training: torchrun's agent, called from a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpo.config.schema import RunConfig
from dpo.config.stages import Stage
from dpo.distributed.launch import launch as launch_processes


def launch(
    stage: Stage,
    config: RunConfig,
    paths: Mapping[str, Path | None],
    code: str,
    *,
    port: int = 0,
    timeout_seconds: int = 600,
) -> bool:
    """Call ``run_train`` in every process and wait for all; see ``dpo.distributed.launch``.

    Raises:
        DpoError: that of the first process that failed; the others are ended.
    """
    from dpo.train.stage import run_train

    return launch_processes(
        run_train, stage, config, paths, code, port=port, timeout_seconds=timeout_seconds
    )
