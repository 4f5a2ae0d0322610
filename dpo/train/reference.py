"""The reference stage: log-probabilities of the SFT model, once for every loss and beta."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist

from dpo.config.schema import RunConfig
from dpo.config.stages import OUT_OF_BAND, stage_settings
from dpo.data.log_probs import PairLogProbs, write_log_probs
from dpo.data.schema import TEST, TRAIN
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.device import best_device
from dpo.distributed.launch import is_shared, launch
from dpo.distributed.together import is_first
from dpo.errors import ArtifactError, NonFiniteError
from dpo.modeling.archive import checkpoint_folder
from dpo.modeling.budget import scoring_budget
from dpo.modeling.load import check_length, load_for_training
from dpo.modeling.memory import enough_memory
from dpo.modeling.precision import compute_dtype, name_of, say_if_slow
from dpo.modeling.scoring import NDArray
from dpo.modeling.sharded import load_once, on_devices, score_shared
from dpo.storage.base_model import local_model
from dpo.storage.given_model import read_model
from dpo.storage.manifest import (
    Manifest,
    check_place,
    read_manifest,
    staged,
    write_manifest,
)
from dpo.storage.progress import track
from dpo.train.data import load_examples


@enough_memory()
def run_reference(
    config: RunConfig, output: Path, *, pairs: Path, model: Path | None = None, code: str = ""
) -> Manifest:
    """Score the pairs that the preference stage and the evaluation will see.

    Where the one host has several GPUs (or ``DPO_PROCESSES``), and ``trainer`` is not BasicTrainer,
    each process scores a share of the pairs, with a model of its own or, where a device is too
    small for that, with the one that all hold together.

    Args:
        config: Settings; which pairs is decided by ``n_examples``, ``n_epochs``,
            ``n_eval_examples`` and ``seed``, as in the stages that read the result.
        output: Folder to make.
        pairs: Output of ingest.
        model: Checkpoint to score with; None takes ``model.archive`` or the base model.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        DpoError: an input that is incomplete or does not fit.
    """
    if is_first():
        check_place(output)
    if is_shared(config):
        paths = {"output": output, "pairs": pairs, "model": model}
        wait = config.process_timeout_seconds
        launch(run_reference, "reference", config, paths, code, timeout_seconds=wait)
        return read_manifest(output, stage="reference")
    device = best_device()
    inputs = _input_hashes(config, pairs, model)
    # the types may differ by explicit choice; the check at step 0 then says by how much it shows
    settings = config.model.model_copy(update={"policy_dtype": config.model.reference_dtype})
    load = partial(load_for_training, settings, model, device=device)
    policy, tokenizer = load_once(load) if dist.is_initialized() else load()
    check_length(policy, config.max_length)
    # the set of pairs does not depend on how they are batched
    examples = load_examples(config, pairs, tokenizer, batch_size=1, responses="pair")
    # a pair of a weighted source may come more than once
    unique = {example.pair_id: example for example in examples.train.values()}
    train = list(unique.values()) if config.score_training_pairs else []
    every = [*train, *examples.held_out]
    splits = [TRAIN] * len(train) + [TEST] * len(examples.held_out)
    if dist.is_initialized():
        policy = on_devices(policy, settings, device)
    dtype = compute_dtype(settings, device)
    say_if_slow(dtype, device, "reference")
    with track("reference", "pairs", len(every)) as bar:
        scored = score_shared(
            policy,
            every,
            dtype=dtype,
            token_budget=scoring_budget(config, policy, device),
            bar=bar,
        )
    if not is_first():
        return Manifest("reference", (), "")
    _check_finite(every, scored)
    rows = [
        (example.pair_id, PairLogProbs(split, example.tokens_hash(), chosen, rejected))
        for example, split, (chosen, rejected) in zip(every, splits, scored, strict=True)
    ]
    with staged(output) as folder:
        write_log_probs(folder, rows)
        return write_manifest(
            folder,
            "reference",
            settings=stage_settings(config, "reference"),
            inputs=inputs,
            code=code,
            details={
                "pairs": len(every),
                "tokens": sum(e.n_tokens for e in every),
                "compute_dtype": name_of(dtype),
            },
        )


def is_scored(
    config: RunConfig, output: Path, *, pairs: Path, model: Path | None = None, code: str = ""
) -> bool:
    """Whether ``output`` already holds what ``run_reference`` would make, within rounding.

    Other processes or threads round otherwise. A training that was ended goes on with the bits that
    it began with: checkpoints are of no use to others.

    Args:
        config: As for ``run_reference``.
        output: The folder.
        pairs: As there.
        model: As there.
        code: As there.
    """
    try:
        made = read_manifest(output, stage="reference")
    except ArtifactError:
        return False
    inputs = _input_hashes(config, pairs, model)
    if "model" not in inputs:
        # a file of weights, which may be another one by now
        return False
    settings = stage_settings(config, "reference")
    differ = {key for key, value in settings.items() if made.settings.get(key) != value}
    return (made.inputs, made.code) == (inputs, code) and differ <= OUT_OF_BAND


def _input_hashes(config: RunConfig, pairs: Path, model: Path | None) -> dict[str, str]:
    inputs = {"pairs": read_manifest(pairs, stage="ingest").content_hash}
    if scorer := _scorer(config, model):
        inputs["model"] = scorer
    return inputs


def _scorer(config: RunConfig, model: Path | None) -> str:
    """Content hash of the model that scores; empty for a file of weights, which has none."""
    archive = config.model.archive
    if model is not None:
        return read_model(model, "base").content_hash
    if archive and Path(archive).is_file():
        return ""
    folder = checkpoint_folder(Path(archive)) if archive else local_model(config.model)
    return read_model(folder, needs_tokenizer=bool(archive)).content_hash


def _check_finite(examples: list[TokenizedExample], scored: list[tuple[NDArray, ...]]) -> None:
    """Refuse to keep what no training can start from."""
    bad = [
        example.pair_id
        for example, responses in zip(examples, scored, strict=True)
        if not all(np.isfinite(log_probs_T).all() for log_probs_T in responses)
    ]
    if bad:
        raise NonFiniteError(
            f"the model's log-probabilities of {len(bad):,} of {len(examples):,} pairs are not "
            "finite; none is kept",
            where=f"pairs {', '.join(bad[:8])}",
            fix="look for NaN in the model's weights, or use model.reference_dtype=float32",
        )
