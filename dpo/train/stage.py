"""The training stage: SFT or preference, by ``config.loss``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dpo.config.compose import flatten
from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.config.stages import OUT_OF_BAND, Stage, stage_settings
from dpo.data.log_probs import PairLogProbs, check_scorer, read_log_probs, select_log_probs
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.device import best_device
from dpo.distributed.together import barrier, is_first
from dpo.errors import ConfigError, StoreError
from dpo.modeling.archive import checkpoint_folder
from dpo.modeling.blocks import find_blocks
from dpo.modeling.budget import token_budget
from dpo.modeling.lanes import lanes_for
from dpo.modeling.load import check_length, load_for_training, save_model
from dpo.modeling.lora import (
    adapter_off,
    add_adapter,
    has_adapter,
    remove_adapter,
    save_adapter,
    whole_state,
)
from dpo.modeling.memory import enough_memory
from dpo.modeling.precision import DTYPES, compute_dtype, name_of, say_if_slow
from dpo.modeling.recompute import checkpoint_activations
from dpo.modeling.scoring import score
from dpo.modeling.sharded import Scorer, load_once, release, shard
from dpo.plan.split import check_lora
from dpo.storage.given_model import read_model
from dpo.storage.manifest import MANIFEST, Manifest, read_manifest, staged, write_manifest
from dpo.storage.progress import message, track
from dpo.train.checkpoint import Checkpoints, steps_in
from dpo.train.data import Examples, load_examples
from dpo.train.launch import launch
from dpo.train.log import MetricLog, open_sinks
from dpo.train.parallel import Layout, Ranks, check_batch, check_examples, whole_weights
from dpo.train.place import Place, place_of
from dpo.train.record import details_of, write_run
from dpo.train.spread import spread_layers
from dpo.train.step import Objective
from dpo.train.tensor_parallel import parallelize
from dpo.train.trainer import Trainer


@enough_memory()
def run_train(
    config: RunConfig,
    output: Path,
    *,
    pairs: Path,
    base: Path | None = None,
    reference: Path | None = None,
    checkpoints: Path | None = None,
    code: str = "",
) -> Manifest:
    """Train a model and write it as a checkpoint into the folder ``output``.

    Args:
        config: Settings; ``loss=sft`` trains on the chosen responses, any other loss on pairs.
        output: Folder to make.
        pairs: Output of ingest.
        base: Checkpoint to start from; None takes ``model.archive`` or the base model.
        reference: Output of reference; None scores the pairs with the starting weights.
        checkpoints: Folder of periodic checkpoints; None takes a place under ``DPO_CHECKPOINTS``
            that is removed when the run is complete, or keeps none where that is not set.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        DpoError: an input that is incomplete or does not fit, or training that cannot go on.
    """
    stage: Stage = "sft" if isinstance(config.loss, SFTLoss) else "preference"
    if config.trainer.name != "BasicTrainer" and not dist.is_initialized():
        paths = {"output": output, "pairs": pairs, "base": base, "reference": reference}
        paths["checkpoints"] = checkpoints
        first_here = launch(
            stage,
            config,
            paths,
            code,
            port=config.fsdp_port or 0,
            timeout_seconds=config.process_timeout_seconds,
        )
        # another host's first process has written it, and this host may not see it
        there = first_here or (output / MANIFEST).is_file()
        return read_manifest(output, stage=stage) if there else Manifest(stage, (), "")
    inputs = _input_hashes(pairs, base, reference)
    identity = _identity(config, stage, inputs, code)
    given = Place(checkpoints) if checkpoints and not config.checkpoint_uri else None
    place = given or place_of(stage, identity, config.checkpoint_uri)
    with _output(output) as folder:
        keeper = (
            Checkpoints(place, identity, config.keep_checkpoints, config.resume) if place else None
        )
        start = keeper.find() if keeper else None
        log = MetricLog(folder, begin=start)
        try:
            if is_first():
                log.sinks += open_sinks(config, stage, output.parent, stage_settings(config, stage))
            trainer = _trainer(config, stage, pairs, base, reference, log, keeper)
            if start:
                trainer.go_on_from(start)
                trainer.position.check_within(trainer.examples.order, start)
            trainer.run()
        finally:
            if keeper:
                # first: on a full disk the log cannot be closed either
                keeper.close()
            log.close()
        manifest = _write(trainer, folder, config, stage, inputs, code)
    if keeper and not given:
        _discard(keeper, stage)
    return manifest


def check_checkpoints(
    config: RunConfig, folder: Path, *, pairs: Path, base: Path | None, code: str
) -> None:
    """Refuse checkpoints of another run before a reference is scored in the place of theirs.

    Other processes score other bits, with which the run that they belong to could not go on.

    Raises:
        ConfigError, ArtifactError: as ``run_train`` does; the reference itself is not compared.
    """
    if config.resume == "never" or not steps_in(folder):
        # without reading the whole base model once more
        return
    stage: Stage = "preference"
    identity = _identity(config, stage, _input_hashes(pairs, base, None), code)
    keeper = Checkpoints(Place(folder), identity, config.keep_checkpoints, config.resume)
    keeper.check_identity(left_out="input reference")


def _discard(keeper: Checkpoints, stage: Stage) -> None:
    """Remove checkpoints that nobody needs any more; that they stay is no reason to fail."""
    try:
        keeper.discard()
    except StoreError as error:
        message(stage, f"training is complete, but its checkpoints could not be removed: {error}")


def _identity(config: RunConfig, stage: Stage, inputs: dict[str, str], code: str) -> dict[str, Any]:
    """What decides the result of a training, flat."""
    settings = {
        key: value
        for key, value in flatten(stage_settings(config, stage)).items()
        if key.partition(".")[0] not in OUT_OF_BAND
    }
    return {**settings, **{f"input {name}": hash_ for name, hash_ in inputs.items()}, "code": code}


@contextmanager
def _output(output: Path) -> Iterator[Path]:
    """The folder to write to: of the output in the first process, a temporary one in others."""
    if is_first():
        with staged(output) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def _trainer(
    config: RunConfig,
    stage: Stage,
    pairs: Path,
    base: Path | None,
    reference: Path | None,
    log: MetricLog,
    keeper: Checkpoints | None,
) -> Trainer:
    device = best_device()
    layout = Layout.of(config.trainer, device) if dist.is_initialized() else None
    ranks = Ranks.here(layout)
    check_batch(config, ranks)
    _check_types(config)
    torch.manual_seed(config.seed)
    load = partial(load_for_training, config.model, base, device=device)
    model, tokenizer = load_once(load) if layout else _load(config, base, device)
    check_length(model, config.max_length)
    if config.lora.enabled:
        check_lora(config)
        add_adapter(model, config.lora, _base_of_adapter(config, base))
    checkpoint_activations(model, config.activation_checkpointing, config.model.block_name)
    examples = load_examples(
        config,
        pairs,
        tokenizer,
        batch_size=config.batch_size,
        responses="sft_target" if stage == "sft" else "pair",
    )
    if examples.chat_template is not None:
        # who uses the model must prompt it as it was trained
        tokenizer.chat_template = examples.chat_template
    check_examples(examples.order.total_examples, ranks)
    _say_what_is_missing(config, stage, examples)
    scorer = Scorer(model, config.max_length if dist.is_initialized() else None)
    dtype = compute_dtype(config.model, device)
    if layout and layout.tensor:
        parallelize(model, layout.tensor, device=device)
    if layout and layout.data:
        # what is split over processes has come to each of them with that
        to_get = None if layout.tensor else device
        scorer = shard(scorer, config.model, layout.data, device=to_get)
        # FSDP casts by itself where it is asked to
        dtype = DTYPES[config.model.fsdp_policy_mp] if config.model.fsdp_policy_mp else dtype
    elif config.model.fsdp_policy_mp and is_first():
        message(
            stage,
            f"model.fsdp_policy_mp={config.model.fsdp_policy_mp} is of FSDPTrainer, and says "
            f"nothing here: products are in {name_of(dtype)} (model.compute_dtype)",
        )
    say_if_slow(dtype, device, stage)
    objective = Objective(
        model,
        config.loss,
        dtype,
        token_budget(config, model, device),
        scorer=scorer,
        ranks=ranks,
        # what is computed again for a block takes random states that all threads share
        lanes=1 if config.activation_checkpointing != "none" else lanes_for(model),
    )
    needed = config.loss.needs_reference
    log_probs = _reference(objective, examples, reference) if needed else None
    return Trainer(config, stage, objective, examples, log_probs, log, tokenizer, keeper)


def _load(config: RunConfig, base: Path | None, device: str) -> tuple[Any, Any]:
    """Model and tokenizer; over all GPUs of this process where it is alone and has several."""
    gpus = torch.cuda.device_count() if config.trainer.name == "BasicTrainer" else 0
    if gpus < 2:
        return load_for_training(config.model, base, device=device)
    message(
        "train",
        f"trainer=BasicTrainer: the layers lie on {gpus} GPUs, of which one works at a time; "
        "trainer=FSDPTrainer lets all work, CUDA_VISIBLE_DEVICES=0 takes one",
    )
    model, tokenizer = load_for_training(config.model, base)
    devices = [torch.device("cuda", number) for number in range(gpus)]
    spread_layers(model, find_blocks(model, config.model.block_name), devices)
    return model, tokenizer


def _check_types(config: RunConfig) -> None:
    if config.model.policy_dtype == "float16" and config.optimizer == "RMSprop":
        raise ConfigError(
            "RMSprop cannot update float16 weights: its epsilon of 1e-8 is 0 in that type, and a "
            "gradient of 0 gives 0/0",
            where="model.policy_dtype",
            fix="use optimizer=AdamW, or policy_dtype=float32 (over several processes with "
            "model.fsdp_policy_mp=float16)",
        )


def _say_what_is_missing(config: RunConfig, stage: Stage, examples: Examples) -> None:
    order = examples.order
    if config.n_epochs == 0:
        if is_first():
            message(stage, "n_epochs=0: nothing is trained, the model goes on as it is")
    elif config.n_examples and order.total_examples < config.n_examples and is_first():
        message(
            stage,
            f"n_examples is {config.n_examples:,}, but n_epochs={config.n_epochs} over "
            f"{order.n_pairs:,} training pairs gives {order.total_examples:,}: training ends there "
            "(more with n_epochs=null, or another number)",
        )
    if is_first() and (cut := examples.cut()):
        message(stage, f"{cut} (max_length={config.max_length})")


def _base_of_adapter(config: RunConfig, base: Path | None) -> str:
    """What an adapter's folder will name as its base: where it is found from any folder.

    Raises:
        ConfigError: the base is no model that an adapter alone could be opened on.
    """
    archive = config.model.archive
    if base is None and archive and not Path(archive).is_file():
        # it may name a run's folder, or a policy.pt that lies in none
        base = checkpoint_folder(Path(archive))
    name = str(base or archive or config.model.name_or_path)
    if Path(name).is_file() and config.lora.save == "adapter":
        raise ConfigError(
            "an adapter alone needs a base that can be opened, and the base here is a file of "
            "weights",
            where=f"model.archive={name}",
            fix="use lora.save=merged, or train from a checkpoint folder",
        )
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _write(
    trainer: Trainer,
    folder: Path,
    config: RunConfig,
    stage: Stage,
    inputs: dict[str, str],
    code: str,
) -> Manifest:
    """The final artifact, by the first process; the others wait."""
    weights = whole_weights(trainer.objective.model)
    details = details_of(trainer)
    manifest = Manifest(stage, (), "")
    if is_first():
        _save(trainer, config, folder, weights)
        write_run(folder, config, stage, trainer.examples, code, details)
        manifest = write_manifest(
            folder,
            stage,
            settings=stage_settings(config, stage),
            inputs=inputs,
            code=code,
            details=details,
        )
    barrier()
    return manifest


def _save(
    trainer: Trainer, config: RunConfig, folder: Path, weights: dict[str, torch.Tensor] | None
) -> None:
    """A whole model, or an adapter alone with the tokenizer."""
    model = trainer.objective.model
    if has_adapter(model) and config.lora.save == "adapter":
        save_adapter(model, folder, weights)
        trainer.tokenizer.save_pretrained(str(folder))
        return
    if has_adapter(model):
        weights = whole_state(model, weights)
        remove_adapter(model)
    save_model(model, trainer.tokenizer, folder, weights)


def _input_hashes(pairs: Path, base: Path | None, reference: Path | None) -> dict[str, str]:
    inputs = {"pairs": read_manifest(pairs, stage="ingest").content_hash}
    if base is not None:
        inputs["base"] = read_model(base, "base").content_hash
    if reference is not None:
        scored = read_manifest(reference, stage="reference")
        inputs["reference"] = scored.content_hash
        if start := inputs.get("base"):
            check_scorer(
                scored,
                start,
                reference,
                named="the one that training starts from",
                fix="make them with that model, or leave them out: training then makes its own",
            )
    return inputs


def _reference(
    objective: Objective, examples: Examples, folder: Path | None
) -> dict[str, PairLogProbs]:
    every = [*examples.train.values(), *examples.held_out]
    if folder is not None:
        details = read_manifest(folder, stage="reference", verify=False).details
        objective.scored_in = details.get("compute_dtype", "")
        rows = select_log_probs(read_log_probs(folder), every, folder)
    else:
        # an adapter's base is its own reference
        with adapter_off(objective.model):
            rows = score_pairs(objective, every, "reference")
    return {example.pair_id: row for example, row in zip(every, rows, strict=True)}


def score_pairs(
    objective: Objective, examples: list[TokenizedExample], step: str, split: str = ""
) -> list[PairLogProbs]:
    """Log-probabilities of both responses of each pair, with a progress bar."""
    with track(step, "pairs", len(examples)) as bar:
        scored = score(
            objective.model,
            examples,
            dtype=objective.dtype,
            token_budget=objective.token_budget,
            bar=bar,
            forward=objective.scorer,
        )
    release(objective.scorer)
    return [
        PairLogProbs(split, example.tokens_hash(), chosen, rejected)
        for example, (chosen, rejected) in zip(examples, scored, strict=True)
    ]
