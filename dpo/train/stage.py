"""The training stage: SFT or preference, by ``config.loss``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.config.stages import Stage, stage_settings
from dpo.data.log_probs import PairLogProbs, read_log_probs, select_log_probs
from dpo.data.tokenize import TokenizedExample
from dpo.errors import ConfigError
from dpo.modeling.load import check_length, load_for_training, save_model
from dpo.modeling.precision import compute_dtype
from dpo.modeling.scoring import score
from dpo.storage.manifest import Manifest, read_manifest, staged, write_manifest
from dpo.storage.progress import track
from dpo.train.data import Examples, load_examples
from dpo.train.log import MetricLog
from dpo.train.step import Objective
from dpo.train.trainer import NLL_PER_TOKEN, Trainer, best_device, checkpoint_activations


def run_train(
    config: RunConfig,
    output: Path,
    *,
    pairs: Path,
    base: Path | None = None,
    reference: Path | None = None,
    code: str = "",
) -> Manifest:
    """Train a model and write it as a checkpoint into the folder ``output``.

    Args:
        config: Settings; ``loss=sft`` trains on the chosen responses, any other loss on pairs.
        output: Folder to make.
        pairs: Output of ingest.
        base: Checkpoint to start from; None takes ``model.archive`` or the base model.
        reference: Output of reference; None scores the pairs with the starting weights.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        DpoError: an input that is incomplete or does not fit, or training that cannot go on.
    """
    stage: Stage = "sft" if isinstance(config.loss, SFTLoss) else "preference"
    _refuse_other_trainers(config)
    inputs = _input_hashes(pairs, base, reference)
    device = best_device()
    torch.manual_seed(config.seed)
    model, tokenizer = load_for_training(config.model, base, device=device)
    check_length(model, config.max_length)
    checkpoint_activations(model, config.activation_checkpointing)
    examples = load_examples(
        config,
        pairs,
        tokenizer,
        batch_size=config.batch_size,
        responses="sft_target" if stage == "sft" else "pair",
    )
    objective = Objective(
        model, config.loss, compute_dtype(config.model, device), config.micro_batch_tokens
    )
    needed = config.loss.needs_reference
    log_probs = _reference(objective, examples, reference) if needed else None
    with staged(output) as folder:
        log = MetricLog(folder)
        trainer = Trainer(config, stage, objective, examples, log_probs, log)
        try:
            trainer.run()
        finally:
            log.close()
        save_model(model, tokenizer, folder)
        details = _details(trainer)
        _write_run(folder, config, stage, examples, code, details)
        return write_manifest(
            folder,
            stage,
            settings=stage_settings(config, stage),
            inputs=inputs,
            code=code,
            details=details,
        )


def _refuse_other_trainers(config: RunConfig) -> None:
    if config.trainer.name != "BasicTrainer":
        raise ConfigError(
            f"trainer={config.trainer.name} cannot run in this version",
            where="trainer",
            fix="use trainer=BasicTrainer: one process",
        )


def _input_hashes(pairs: Path, base: Path | None, reference: Path | None) -> dict[str, str]:
    inputs = {"pairs": read_manifest(pairs, stage="ingest").content_hash}
    if base is not None:
        inputs["base"] = read_manifest(base).content_hash
    if reference is not None:
        inputs["reference"] = read_manifest(reference, stage="reference").content_hash
    return inputs


def _reference(
    objective: Objective, examples: Examples, folder: Path | None
) -> dict[str, PairLogProbs]:
    every = [*examples.train.values(), *examples.held_out]
    if folder is not None:
        rows = select_log_probs(read_log_probs(folder), every, folder)
    else:
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
        )
    return [
        PairLogProbs(split, example.tokens_hash(), chosen, rejected)
        for example, (chosen, rejected) in zip(examples, scored, strict=True)
    ]


def _details(trainer: Trainer) -> dict[str, Any]:
    details: dict[str, Any] = {
        "examples": trainer.trained,
        "steps": trainer.steps,
        "first_train_loss": trainer.first.get("loss/train"),
        "last_train_loss": trainer.last.get("loss/train"),
        "first_nll_per_token": trainer.first.get(NLL_PER_TOKEN),
        "last_nll_per_token": trainer.last.get(NLL_PER_TOKEN),
        "compute_dtype": str(trainer.objective.dtype).removeprefix("torch."),
        "metrics": {**trainer.last, **trainer.evaluation},
    }
    return details


def _write_run(
    folder: Path,
    config: RunConfig,
    stage: Stage,
    examples: Examples,
    code: str,
    details: dict[str, Any],
) -> None:
    record = {
        "stage": stage,
        "config": stage_settings(config, stage),
        "data_fingerprint": examples.fingerprint,
        "code": code,
        **details,
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
