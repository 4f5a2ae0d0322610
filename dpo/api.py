"""Training from Python: ``from dpo import run_training``.

One call does what ``dpo train`` does: read and validate the pairs, score them with the reference
model where the loss needs it, train, and write a checkpoint. Nothing heavy is imported until it is
called. A terminal and a notebook show the progress of each stage as a bar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from dpo.config.overrides import model_overrides, override_value
from dpo.errors import ConfigError


class TrainingResult(TypedDict):
    """What ``run_training`` returns; paths are absolute."""

    artifact_path: str
    """Folder of the checkpoint: a Hugging Face directory with ``run.json`` and manifest."""
    checkpoint: Path
    """The same folder as a path."""
    run_dir: Path
    """Folder of the run: the checkpoint and, where this run made them, data and reference."""
    metrics: dict[str, float]
    """Last figures of training and evaluation, by the reference code's names."""
    manifest: dict[str, Any]
    """The checkpoint's manifest: files with sha256, settings, content hashes of the inputs."""
    run_manifest: dict[str, Any]
    """The run's own record: settings, data fingerprint, code, first and last losses."""
    config: dict[str, Any]
    """Every setting of the run."""


def run_training(
    model_name: str = "smollm2",
    datasets: Sequence[str | PathLike[str]] | str = ("hh_sample",),
    loss_config: Mapping[str, Any] | None = None,
    exp_name: str = "run",
    n_examples: int | None = None,
    debug: bool = False,
    *,
    output_dir: str | PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> TrainingResult:
    """Train a model and return where it is and how it went.

    Args:
        model_name: A name of ``config/model`` (``zephyr``, ``smollm2``), a hub id or a folder.
        datasets: Names of ``config/dataset``, or files, folders and URLs of pairs.
        loss_config: ``{"name": "dpo", "beta": 0.1}``: a name of ``config/loss`` and its options;
            ``{"name": "sft"}`` trains on the chosen responses. DPO when left out.
        exp_name: Name of the run.
        n_examples: Stop after so many training examples; None trains on all pairs once.
        debug: No wandb and no periodic checkpoints.
        output_dir: Folder of the run; chosen under ``local_dirs`` when left out.
        overrides: Any further settings, as ``key=value`` on the command line: ``["lr=1e-5"]``.

    Raises:
        ConfigError: a name or value that cannot work; found before anything heavy is loaded.
        DataError: pairs that are missing or not what they should be.
        ModelError: a base model that is not to be had.
        TrainingError: training that cannot go on.
    """
    from dpo.config.compose import compose

    given = [
        *model_overrides(model_name),
        f"datasets={override_value([datasets] if isinstance(datasets, str) else list(datasets))}",
        *_loss(loss_config or {"name": "dpo"}),
        f"exp_name={override_value(exp_name)}",
        f"n_examples={override_value(n_examples)}",
        f"debug={override_value(debug)}",
        *([f"local_run_dir={override_value(output_dir)}"] if output_dir is not None else []),
        *overrides,
    ]
    config = compose(given).config

    from dpo.storage.host_memory import prepare
    from dpo.storage.manifest import MANIFEST, read_manifest

    prepare()
    from dpo.train.direct import train_directly

    checkpoint = train_directly(config).absolute()
    metrics = read_manifest(checkpoint, verify=False).details.get("metrics", {})
    return TrainingResult(
        artifact_path=str(checkpoint),
        checkpoint=checkpoint,
        run_dir=checkpoint.parent,
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        manifest=json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")),
        run_manifest=json.loads((checkpoint / "run.json").read_text(encoding="utf-8")),
        config=config.model_dump(mode="json"),
    )


def _loss(options: Mapping[str, Any]) -> list[str]:
    if "name" not in options:
        raise ConfigError("loss_config has no name", fix='for example {"name": "dpo", "beta": 0.1}')
    own = [f"loss.{key}={override_value(value)}" for key, value in options.items() if key != "name"]
    return [f"loss={override_value(options['name'])}", *own]
