"""Where a training step trains: in its own pod, or over the nodes of a job that it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from dpo.config.nodes import NodesConfig, wanted_nodes
from dpo.config.stages import stage_json
from dpo.plan.booked import one_process
from dpo.storage.manifest import Manifest
from dpo.storage.step import Step
from dpo.train.place import ROOT_VARIABLE


class Artifact(Protocol):
    """What this module needs of ``kfp.dsl.Artifact``."""

    path: str
    uri: str


def train_step(
    run: Step,
    output: Artifact,
    *,
    pairs: Artifact,
    base: Artifact | None = None,
    reference: Artifact | None = None,
) -> Manifest:
    """Train where the package says, and return the manifest of the result.

    Raises:
        DpoError: as ``dpo.train.stage.run_train`` and ``dpo.nodes.run.train_on_nodes``.
    """
    if nodes := wanted_nodes():
        return _on_nodes(nodes, run, output, {"pairs": pairs, "base": base, "reference": reference})
    from dpo.train.stage import run_train

    return run_train(
        run.config,
        Path(output.path),
        pairs=Path(pairs.path),
        base=Path(base.path) if base else None,
        reference=Path(reference.path) if reference else None,
        code=run.code,
    )


def _on_nodes(
    nodes: NodesConfig, run: Step, output: Artifact, inputs: dict[str, Artifact | None]
) -> Manifest:
    from dpo.nodes.request import Request
    from dpo.nodes.run import train_on_nodes

    if run.config.trainer.name == "BasicTrainer":
        raise one_process(nodes.options.count, run.stage)
    request = Request(
        stage=run.stage,
        settings=stage_json(run.config, run.stage, key_only=False),
        code=run.code,
        inputs={name: artifact.uri for name, artifact in inputs.items() if artifact},
        output=output.uri,
        checkpoints=os.environ.get(ROOT_VARIABLE, ""),
        lease_seconds=nodes.options.lease_seconds,
    )
    return train_on_nodes(nodes, request)
