"""What an evaluation is given, read and checked: pairs, two models, log-probabilities of the first.

The models may be of anybody. The first is the reference of the rewards: log-probabilities that are
given must be its own, and what both read must be the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo.config.schema import RunConfig
from dpo.data.loader import evaluation_indices
from dpo.data.log_probs import PairLogProbs, check_scorer, read_log_probs, select_log_probs
from dpo.data.parquet import read_pairs
from dpo.data.schema import TEST, Pair
from dpo.data.tokenize import Limits, TokenizedExample, load_tokenizer, moved_ids
from dpo.data.tokens import tokenize_rows
from dpo.distributed.together import is_first
from dpo.errors import DataError, ModelError
from dpo.evaluate.findings import other_loss
from dpo.evaluate.measure import check_finite
from dpo.evaluate.parts import in_part
from dpo.storage.given_model import read_model
from dpo.storage.manifest import Manifest, read_manifest
from dpo.storage.progress import message

USUAL = {"pairs": "ingest", "sft": "sft", "policy": "preference", "reference": "reference"}
"""The step that each input comes from in the pipeline."""


@dataclass(frozen=True)
class Inputs:
    """What was given to the step, read and checked."""

    manifests: Mapping[str, Manifest]
    rows: list[Pair]
    examples: list[TokenizedExample]
    before: list[PairLogProbs]
    """Of the SFT model; empty where the evaluation is to score the pairs with it."""
    tokenizer: Any
    ends: Mapping[str, str] = field(default_factory=dict)
    """End-of-sequence tokens of ``sft`` and ``policy``, where they differ."""

    def shown(self) -> dict[str, Manifest]:
        """The manifests by the step that made each, as the report names them."""
        return {_title(name, manifest.stage): manifest for name, manifest in self.manifests.items()}


def _title(name: str, stage: str) -> str:
    return stage if stage == USUAL[name] else f"{name} ({stage})"


def read_inputs(
    config: RunConfig, *, pairs: Path, sft: Path, policy: Path, reference: Path | None
) -> Inputs:
    """Read and check everything but the weights.

    Raises:
        DpoError: an input that is incomplete or does not fit the others.
    """
    manifests = {
        "pairs": read_manifest(pairs, stage="ingest"),
        "sft": read_model(sft, "sft"),
        "policy": read_model(policy, "policy"),
    }
    if reference is not None:
        manifests["reference"] = read_manifest(reference, stage="reference")
        _check_scored(manifests["reference"], manifests["sft"], reference)
    if is_first():
        _say(config, manifests)
    held_out = read_pairs(pairs, TEST)
    chosen = evaluation_indices(len(held_out.rows), config.n_eval_examples, config.seed)
    if not chosen:
        raise DataError("no pair is held out", where=str(pairs), fix="raise test_fraction")
    rows = _in_part(config, [held_out.rows[index] for index in chosen])
    trusted = config.model.trust_remote_code
    tokenizer = load_tokenizer(policy, trust_remote_code=trusted)
    places = {row.pair_id: index for index, row in enumerate(held_out.rows)}
    indices = [places[row.pair_id] for row in rows]
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    examples = tokenize_rows(held_out, indices, tokenizer, limits)
    if reference is None:
        own = load_tokenizer(sft, trust_remote_code=trusted)
        _check_same_tokens(own, tokenizer, sft)
        ends = {"sft": own.eos_token, "policy": tokenizer.eos_token}
        differ = own.eos_token_id != tokenizer.eos_token_id
        return Inputs(manifests, rows, examples, [], tokenizer, ends if differ else {})
    before = select_log_probs(read_log_probs(reference), examples, reference)
    check_finite(before, "SFT model")
    return Inputs(manifests, rows, examples, before, tokenizer)


def _check_scored(scored: Manifest, sft: Manifest, where: Path) -> None:
    if not scored.inputs.get("model") and is_first():
        message("evaluate", "nothing tells whether the log-probabilities are of the SFT model")
    check_scorer(
        scored,
        sft.content_hash,
        where,
        named="sft",
        fix="give the model that they were made with, or leave them out: evaluate then makes "
        "its own",
    )


def _check_same_tokens(own: Any, tokenizer: Any, sft: Path) -> None:
    """Refuse models that read a text as different tokens: their log-probabilities say nothing."""
    if moved_ids(own, tokenizer) is not None:
        raise ModelError(
            "sft and policy have different tokenizers: the same text has other ids",
            where=str(sft),
            fix="compare models of one family, such as a model and what it was trained from",
        )


def _say(config: RunConfig, manifests: Mapping[str, Manifest]) -> None:
    if differing := other_loss(loss_of(manifests["policy"]), config.loss.model_dump(mode="json")):
        message(
            "evaluate",
            f"the policy was trained with {differing[0]}: give evaluate the same settings, or its "
            "rewards are those of another loss",
        )
    wanted = config.evaluation
    if wanted.n_samples and wanted.top_p < 1 and not wanted.temperature:
        text = f"evaluation.top_p={wanted.top_p:g} counts for nothing at evaluation.temperature=0"
        message("evaluate", f"{text}: the answers are greedy")


def loss_of(policy: Manifest) -> Mapping[str, Any]:
    """The preference loss that a model was trained with; empty for a model of any other kind."""
    return (policy.settings.get("loss") or {}) if policy.stage == "preference" else {}


def _in_part(config: RunConfig, rows: list[Pair]) -> list[Pair]:
    wanted = config.evaluation
    found = [row for row in rows if in_part(row.prompt, wanted.part, wanted.validation_fraction)]
    if not found:
        raise DataError(
            f"none of the {len(rows)} held-out pairs is in the {wanted.part} part",
            where="evaluation.part",
            fix="raise n_eval_examples or test_fraction, or change evaluation.validation_fraction",
        )
    return found
