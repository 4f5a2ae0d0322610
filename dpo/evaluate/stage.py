"""The evaluation stage: held-out figures, samples of both models, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.data.loader import evaluation_indices
from dpo.data.log_probs import PairLogProbs, read_log_probs, select_log_probs
from dpo.data.parquet import Pairs, read_pairs
from dpo.data.schema import TEST, Pair
from dpo.data.tokenize import Limits, TokenizedExample, load_tokenizer, tokenize_pair
from dpo.errors import ConfigError, DataError
from dpo.evaluate.heldout import HeldOut, figures
from dpo.evaluate.parts import in_part
from dpo.evaluate.report import write_reports
from dpo.modeling.generation import generate
from dpo.modeling.load import load_model
from dpo.modeling.precision import DTYPES, compute_dtype
from dpo.modeling.scoring import score
from dpo.storage.manifest import Manifest, read_manifest, staged, write_manifest
from dpo.storage.progress import track

_SAMPLE_BATCH = 8


def run_evaluate(
    config: RunConfig,
    output: Path,
    *,
    pairs: Path,
    sft: Path,
    policy: Path,
    reference: Path,
    code: str = "",
) -> Manifest:
    """Measure a policy against the SFT model and write figures, samples and report.

    Args:
        config: Settings.
        output: Folder to make.
        pairs: Output of ingest.
        sft: Checkpoint of the SFT stage, the reference.
        policy: Checkpoint of the preference stage.
        reference: Log-probabilities of the SFT model on the held-out pairs.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        DpoError: an input that is incomplete or does not fit.
    """
    if isinstance(config.loss, SFTLoss):
        raise ConfigError(
            "loss=sft: the evaluation compares preferences", fix="use loss=dpo or ipo"
        )
    manifests = {
        "pairs": read_manifest(pairs, stage="ingest"),
        "sft": read_manifest(sft),
        "policy": read_manifest(policy, stage="preference"),
        "reference": read_manifest(reference, stage="reference"),
    }
    held_out = read_pairs(pairs, TEST)
    chosen = evaluation_indices(len(held_out.rows), config.n_eval_examples, config.seed)
    if not chosen:
        raise DataError("no pair is held out", where=str(pairs), fix="raise test_fraction")
    rows = _in_part(config, [held_out.rows[index] for index in chosen])
    tokenizer = load_tokenizer(policy)
    examples = _tokenize(config, held_out, rows, tokenizer)
    before = select_log_probs(read_log_probs(reference), examples, reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(policy, DTYPES[config.model.policy_dtype], device=device)
    after = _score(config, model, examples)
    result = figures(HeldOut([row.prompt for row in rows], before, after), config)
    answers = _answers(config, model, tokenizer, rows)
    del model
    sft_answers = []
    if config.evaluation.n_samples:
        sft_model = load_model(sft, DTYPES[config.model.policy_dtype], device=device)
        sft_answers = _answers(config, sft_model, tokenizer, rows, step_from=len(answers))
    samples = _samples(rows, sft_answers, answers)
    with staged(output) as folder:
        result["samples_file"] = "samples.json"
        _write_json(folder / "evaluation.json", result)
        _write_json(folder / "samples.json", samples)
        provenance = {
            "inputs": {name: manifest.content_hash for name, manifest in manifests.items()},
            "code": {
                **{manifest.stage: manifest.code for manifest in manifests.values()},
                "evaluate": code,
            },
        }
        write_reports(
            folder,
            evaluation=result,
            samples=samples,
            settings={m.stage: m.settings for m in manifests.values()},
            provenance=provenance,
            curves={"SFT": sft / "metrics.jsonl", "preference": policy / "metrics.jsonl"},
            data_report=pairs / "report.json",
        )
        return write_manifest(
            folder,
            "evaluate",
            settings=stage_settings(config, "evaluate"),
            inputs=provenance["inputs"],
            code=code,
            details={
                "n_pairs": result["n_pairs"],
                **{
                    f"{side}": {k: v["value"] for k, v in result[side].items()}
                    for side in ("before", "after")
                },
            },
        )


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


def _tokenize(
    config: RunConfig, pairs: Pairs, rows: list[Pair], tokenizer: Any
) -> list[TokenizedExample]:
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    return [
        tokenize_pair(
            row.prompt,
            [row.chosen, row.rejected],
            tokenizer,
            limits,
            prompt_format=pairs.prompt_format,
            pair_id=row.pair_id,
        )
        for row in rows
    ]


def _score(config: RunConfig, model: Any, examples: list[TokenizedExample]) -> list[PairLogProbs]:
    dtype = compute_dtype(config.model, model.device.type)
    with track("evaluate", "pairs", len(examples)) as bar:
        scored = score(
            model, examples, dtype=dtype, token_budget=config.micro_batch_tokens, bar=bar
        )
    return [
        PairLogProbs(TEST, example.tokens_hash(), chosen, rejected)
        for example, (chosen, rejected) in zip(examples, scored, strict=True)
    ]


def _answers(
    config: RunConfig, model: Any, tokenizer: Any, rows: list[Pair], step_from: int = 0
) -> list[str]:
    prompts = [row.prompt for row in rows[: config.evaluation.n_samples]]
    answers: list[str] = []
    with track("evaluate", "samples", 2 * len(prompts)) as bar:
        bar.done = step_from
        for first in range(0, len(prompts), _SAMPLE_BATCH):
            batch = prompts[first : first + _SAMPLE_BATCH]
            answers += generate(
                model,
                tokenizer,
                batch,
                max_new_tokens=config.evaluation.max_new_tokens,
                max_prompt_length=config.max_prompt_length,
                temperature=config.evaluation.temperature,
                top_p=config.evaluation.top_p,
                seed=config.seed + first,
            )
            bar.advance(len(batch))
    return answers


def _samples(rows: list[Pair], sft: list[str], policy: list[str]) -> list[dict[str, str]]:
    return [
        {
            "pair_id": row.pair_id,
            "dataset": row.dataset,
            "prompt": row.prompt,
            "chosen": row.chosen,
            "sft": sft_answer,
            "policy": policy_answer,
        }
        for row, sft_answer, policy_answer in zip(rows, sft, policy, strict=False)
    ]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False), "utf-8")
