"""Training from one command, as the reference code's ``train.py``: ingest and reference included.

The pipeline runs these stages as steps of their own; here they are folders of the run:

    <run dir>/data        pairs
    <run dir>/reference   log-probabilities of the reference, for a preference loss
    <run dir>/LATEST      the trained model
    <run dir>/checkpoints what a run that was ended goes on from; removed when it is complete,
                          and elsewhere with checkpoint_uri or DPO_CHECKPOINTS

Pairs and log-probabilities that another output in the run's folder was made from are not replaced
by other ones: those are then in <run dir>/<output>-data and <run dir>/<output>-reference.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, restrict, stage_settings
from dpo.data.stage import run_ingest
from dpo.distributed.launch import n_hosts, processes_here
from dpo.errors import ArtifactError, ConfigError, TrainingStopped
from dpo.plan.split import check_counts
from dpo.storage.fingerprint import code_fingerprint
from dpo.storage.manifest import MANIFEST, Manifest, check_place, is_replaceable, read_manifest
from dpo.storage.progress import message
from dpo.train.checkpoint import IDENTITY, steps_in
from dpo.train.place import ROOT_VARIABLE
from dpo.train.reference import is_scored, run_reference
from dpo.train.stage import check_checkpoints, run_train


def train_directly(
    config: RunConfig,
    *,
    data: Path | None = None,
    base: Path | None = None,
    reference: Path | None = None,
    output: Path | None = None,
) -> Path:
    """Train, preparing what is not given; returns the checkpoint's folder.

    Raises:
        DpoError: as the stages do.
    """
    # what training would refuse after hours of reading pairs and scoring a reference
    check_counts(config, n_hosts() * processes_here())
    run_dir = output.parent if output is not None else make_run_dir(config)
    target = output or run_dir / "LATEST"
    check_place(target)
    stage: Stage = "sft" if isinstance(config.loss, SFTLoss) else "preference"
    own = None if os.environ.get(ROOT_VARIABLE) else run_dir / "checkpoints" / target.name
    if own:
        _refuse_what_is_no_checkpoint(own)
    # checkpoints of other code are another run's
    code = code_fingerprint(stage)
    if (target / MANIFEST).is_file():
        message(stage, f"{target} is complete: it is replaced once the new result is")
    needs_scores = config.loss.needs_reference and reference is None
    if data is None:
        message(stage, f"run folder: {run_dir}")
        remade = [run_dir / "reference"] if needs_scores else []
        ingesting = restrict(config, "ingest")
        place = run_dir / "data"
        data = _place(place, target, lambda made: _asks_for(ingesting, made), remade)
        run_ingest(ingesting, data)
    if needs_scores:
        scoring = restrict(config, "reference")
        scorer = code_fingerprint("reference")
        is_same = partial(is_scored, scoring, pairs=data, model=base, code=scorer)
        place = run_dir / "reference"
        reference = _place(place, target, lambda _: is_same(place))
        if own and not config.checkpoint_uri:
            check_checkpoints(restrict(config, stage), own, pairs=data, base=base, code=code)
        goes_on = config.resume != "never" and not (target / MANIFEST).is_file()
        if goes_on and is_same(reference):
            message(stage, f"goes on with the log-probabilities in {reference}")
        else:
            run_reference(scoring, reference, pairs=data, model=base, code=scorer)
    # otherwise the next run would begin in a folder of its own
    other = run_dir if output is None and config.local_run_dir is None else None
    with _told_how_to_go_on(stage, other, own):
        run_train(
            restrict(config, stage),
            target,
            pairs=data,
            base=base,
            reference=reference,
            checkpoints=own,
            code=code,
        )
    if own:
        shutil.rmtree(own, ignore_errors=True)
        with suppress(OSError):
            # unless it holds those of another output
            own.parent.rmdir()
    return target


@contextmanager
def _told_how_to_go_on(stage: Stage, run_dir: Path | None, own: Path | None) -> Iterator[None]:
    """Name what goes on with a training that is ended in here.

    Args:
        stage: Of the training.
        run_dir: Its folder, where the same command would make another one.
        own: Where its checkpoints are, if that is in its folder.
    """
    same = f"the same command with local_run_dir={run_dir}" if run_dir else "the same command"
    again = f"run {same}: it goes on from there"
    try:
        yield
    except TrainingStopped as stopped:
        if run_dir:
            raise TrainingStopped(stopped.found, where=stopped.where, fix=again) from None
        raise
    except KeyboardInterrupt:
        if own and steps_in(own):
            message(stage, f"interrupted after a checkpoint: {again}")
        raise


def _refuse_what_is_no_checkpoint(own: Path) -> None:
    """The folder of a training's checkpoints goes with them at its end."""
    there = [path.name for path in own.glob("*") if not path.name.startswith(".")]
    if there and not steps_in(own) and IDENTITY not in there:
        raise ArtifactError(
            "what is there already are no checkpoints of a training: those of this one would lie "
            "beside it, and all of it would be removed with them",
            where=str(own),
            fix="give the output another name or folder, or set local_run_dir",
        )


def _place(
    folder: Path, target: Path, is_same: Callable[[Manifest], bool], remade: Sequence[Path] = ()
) -> Path:
    """Where to prepare for ``target``: ``folder``, or beside it where that is of use to others.

    ``dpo ingest output=out/data`` and ``dpo train output=out/policy`` share a folder: a training
    that is not told of ``out/data`` would put its own in the place. So would one of
    ``datasets=[data/pairs.jsonl] output=policy``, in place of what it is to read.

    Args:
        folder: The place.
        target: What is trained.
        is_same: Whether what is in the place is what would be made.
        remade: Made anew for ``target`` as well, unless others were made from it.
    """
    beside = folder.with_name(f"{target.name}-{folder.name}")
    if not is_replaceable(folder):
        message("train", f"{folder} stays, for no step wrote it: this run has {beside}")
        return beside
    made = _manifest(folder)
    if not made or not _is_used(folder, target, remade) or is_same(made):
        return folder
    message("train", f"{folder} stays, since others were made from it: this run has {beside}")
    return beside


def _is_used(folder: Path, target: Path, remade: Sequence[Path] = ()) -> bool:
    """Whether outputs beside ``folder`` were made from it, but for ``target`` and ``remade``."""
    made = _manifest(folder)
    for place in folder.parent.glob("*"):
        other = None if place in (folder, target) else _manifest(place)
        made_from_it = made and other and made.content_hash in other.inputs.values()
        if made_from_it and (place not in remade or _is_used(place, target)):
            return True
    return False


def _manifest(folder: Path) -> Manifest | None:
    """Of a complete output; None for any other folder."""
    try:
        return read_manifest(folder, verify=False)
    except (ArtifactError, OSError):
        return None


def _asks_for(ingesting: RunConfig, made: Manifest) -> bool:
    return made.settings == stage_settings(ingesting, "ingest")


def make_run_dir(config: RunConfig) -> Path:
    """``local_run_dir``, or ``<local dir>/<user>/<exp_name>_<time>`` in the first writable one.

    Raises:
        ConfigError: none of ``local_dirs`` can be written to.
    """
    if config.local_run_dir is not None:
        folder = Path(config.local_run_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
    for place in config.local_dirs:
        folder = Path(place).expanduser() / _user() / f"{config.exp_name}_{stamp}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        return folder
    raise ConfigError(
        f"no folder of local_dirs can be written to: {', '.join(config.local_dirs)}",
        fix="name another one: local_dirs=[/folder], or set local_run_dir",
    )


def _user() -> str:
    """The user's name; OpenShift runs pods under numbers that have none."""
    return os.environ.get("USER") or os.environ.get("LOGNAME") or f"uid{os.getuid()}"
