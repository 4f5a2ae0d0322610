"""The evaluation stage: held-out figures, samples of the models, the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.data.loader import evaluation_indices
from dpo.data.log_probs import PairLogProbs, read_log_probs, select_log_probs
from dpo.data.parquet import read_pairs
from dpo.data.schema import TEST, Pair
from dpo.data.tokenize import Limits, TokenizedExample, load_tokenizer
from dpo.data.tokens import tokenize_rows
from dpo.distributed.launch import is_shared, launch
from dpo.distributed.together import is_first
from dpo.errors import ConfigError, DataError
from dpo.evaluate.answers import answer_figures
from dpo.evaluate.findings import findings, other_loss
from dpo.evaluate.heldout import HeldOut, figures, pair_values
from dpo.evaluate.judge import Match, check_service, judge
from dpo.evaluate.measure import Measured, Measurement, Models, check_finite
from dpo.evaluate.parts import in_part
from dpo.evaluate.report import write_reports
from dpo.modeling.lora import base_of, is_adapter
from dpo.modeling.memory import enough_memory
from dpo.storage.lineage import SFT_CHECKPOINT
from dpo.storage.manifest import (
    Manifest,
    check_place,
    read_manifest,
    staged,
    write_manifest,
)
from dpo.storage.progress import message, track
from dpo.storage.provenance import made_by

FORMAT_VERSION = 2
"""Of ``evaluation.json``; 1 had ``before``, ``after``, ``n_pairs`` and ``chance`` alone."""


@dataclass(frozen=True)
class _Inputs:
    """What was given to the step, read and checked."""

    manifests: Mapping[str, Manifest]
    rows: list[Pair]
    examples: list[TokenizedExample]
    before: list[PairLogProbs]
    tokenizer: Any


@enough_memory()
def run_evaluate(
    config: RunConfig,
    output: Path,
    *,
    pairs: Path,
    sft: Path,
    policy: Path,
    reference: Path,
    published: Path | None = None,
    code: str = "",
) -> Manifest:
    """Measure a policy against the SFT model and write figures, samples and report.

    Where the one host has several GPUs (or ``DPO_PROCESSES``), and ``trainer`` is not BasicTrainer,
    each process loads the models and does a share of the pairs and answers.

    Args:
        config: Settings.
        output: Folder to make.
        pairs: Output of ingest.
        sft: Checkpoint of the SFT stage, the reference.
        policy: Checkpoint of the preference stage.
        reference: Log-probabilities of the SFT model on the held-out pairs.
        published: A published version, fetched; measured beside them where it is given.
        code: Fingerprint of the code, kept in the manifest.

    Raises:
        DpoError: an input that is incomplete or does not fit.
    """
    if isinstance(config.loss, SFTLoss):
        raise ConfigError(
            "loss=sft: the evaluation compares preferences", fix="use loss=dpo or ipo"
        )
    if config.evaluation.judge.url and not dist.is_initialized():
        # before hours of measuring
        check_service(config.evaluation.judge)
    published_base = _base_of_published(published, sft)
    if is_first():
        check_place(output)
    if is_shared(config):
        paths = {"output": output, "pairs": pairs, "sft": sft, "policy": policy}
        paths["reference"] = reference
        if published:
            paths["published"] = published
        wait = config.process_timeout_seconds
        launch(run_evaluate, "evaluate", config, paths, code, timeout_seconds=wait)
        return read_manifest(output, stage="evaluate")
    given = _read(config, pairs=pairs, sft=sft, policy=policy, reference=reference)
    measurement = Measurement(config, given.rows, given.examples, given.tokenizer)
    policy_base = _base_of_policy(given.manifests, sft) if is_adapter(policy) else None
    measured = measurement.run(Models(sft, policy, published, policy_base, published_base))
    if not is_first():
        return Manifest("evaluate", (), "")
    held_out = HeldOut(
        prompts=[row.prompt for row in given.rows],
        before=given.before,
        after=measured.after,
        sources=[row.dataset for row in given.rows],
        prompt_tokens=[len(example.prompt_T) for example in given.examples],
        published=measured.published,
    )
    result = _result(config, held_out, measured, given)
    with staged(output) as folder:
        _write_json(folder / "evaluation.json", result)
        _write_json(folder / "pairs.json", _pair_rows(held_out, config, given.rows))
        samples = _samples(measured)
        _write_json(folder / "samples.json", samples)
        inputs = {name: manifest.content_hash for name, manifest in given.manifests.items()}
        write_reports(
            folder,
            evaluation=result,
            samples=samples,
            settings={
                **{m.stage: m.settings for m in given.manifests.values()},
                "evaluate": stage_settings(config, "evaluate"),
            },
            provenance=_provenance(given, code),
            curves={"SFT": sft / "metrics.jsonl", "preference": policy / "metrics.jsonl"},
            data_report=pairs / "report.json",
        )
        return write_manifest(
            folder,
            "evaluate",
            settings=stage_settings(config, "evaluate"),
            inputs=inputs,
            code=code,
            details=_details(result),
        )


def _base_of_published(published: Path | None, sft: Path) -> Path | None:
    """What a published adapter is opened on; None where it can be found by its name.

    Raises:
        ConfigError: it was trained on another SFT model.
    """
    if published is None or not is_adapter(published):
        return None
    name, own = base_of(published), read_manifest(sft, verify=False).content_hash
    if name == f"{SFT_CHECKPOINT}{own}":
        return sft
    if name.startswith(SFT_CHECKPOINT):
        raise ConfigError(
            f"the published version is an adapter of another SFT model, {name}; this run's is "
            f"{own[:12]}",
            where="evaluation.published",
            fix="compare with a version that was published merged (publish.lora=merged)",
        )
    return None


def _base_of_policy(manifests: Mapping[str, Manifest], sft: Path) -> Path | None:
    """The SFT model where it is an adapter's base: the path that training noted may be a pod's."""
    trained_on = manifests["policy"].inputs.get("base")
    return sft if trained_on == manifests["sft"].content_hash else None


def _read(config: RunConfig, *, pairs: Path, sft: Path, policy: Path, reference: Path) -> _Inputs:
    manifests = {
        "pairs": read_manifest(pairs, stage="ingest"),
        "sft": read_manifest(sft),
        "policy": read_manifest(policy, stage="preference"),
        "reference": read_manifest(reference, stage="reference"),
    }
    trained = manifests["policy"].settings.get("loss") or {}
    differing = other_loss(trained, config.loss.model_dump(mode="json"))
    if differing and is_first():
        message(
            "evaluate",
            f"the policy was trained with {differing[0]}: give evaluate the same settings, or its "
            "rewards are those of another loss",
        )
    wanted = config.evaluation
    if wanted.n_samples and wanted.top_p < 1 and not wanted.temperature and is_first():
        text = f"evaluation.top_p={wanted.top_p:g} counts for nothing at evaluation.temperature=0"
        message("evaluate", f"{text}: the answers are greedy")
    held_out = read_pairs(pairs, TEST)
    chosen = evaluation_indices(len(held_out.rows), config.n_eval_examples, config.seed)
    if not chosen:
        raise DataError("no pair is held out", where=str(pairs), fix="raise test_fraction")
    rows = _in_part(config, [held_out.rows[index] for index in chosen])
    tokenizer = load_tokenizer(policy)
    places = {row.pair_id: index for index, row in enumerate(held_out.rows)}
    indices = [places[row.pair_id] for row in rows]
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    examples = tokenize_rows(held_out, indices, tokenizer, limits)
    before = select_log_probs(read_log_probs(reference), examples, reference)
    check_finite(before, "SFT model")
    return _Inputs(manifests, rows, examples, before, tokenizer)


def _provenance(given: _Inputs, code: str) -> dict[str, dict[str, str]]:
    """Parents by content hash, fingerprints of data and code, and what made each of them."""
    manifests = given.manifests
    pairs = manifests["pairs"]
    sources = pairs.details.get("sources") or {}
    made = {manifest.stage: _made_by(manifest.made_by) for manifest in manifests.values()}
    codes = {manifest.stage: manifest.code for manifest in manifests.values()}
    return {
        "parents": {name: manifest.content_hash for name, manifest in manifests.items()},
        "data": {
            "held-out pairs": _pairs_hash(given.rows),
            **{name: str(fingerprint) for name, fingerprint in dict(sources).items()},
        },
        "made by": {**made, "evaluate": _made_by(made_by())},
        "code fingerprints": {**codes, "evaluate": code},
    }


def _made_by(values: Mapping[str, Any]) -> str:
    names = ("version", "commit", "image", "processor")
    return ", ".join(f"{name} {values[name]}" for name in names if values.get(name))


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


def _result(
    config: RunConfig, held_out: HeldOut, measured: Measured, given: _Inputs
) -> dict[str, Any]:
    wanted = config.evaluation
    policy = given.manifests["policy"]
    result = figures(held_out, config)
    result |= {
        "format_version": FORMAT_VERSION,
        "part": wanted.part,
        "loss": config.loss.model_dump(mode="json"),
        "held_out": _pairs_hash(given.rows),
        "policy": {
            "content_hash": policy.content_hash,
            "loss": policy.settings.get("loss"),
            "files": {entry.path: entry.sha256 for entry in policy.files},
        },
        "samples_file": "samples.json",
    }
    if measured.kl:
        result["kl"] = measured.kl
    if measured.answers:
        prompts = [row.prompt for row in measured.rows]
        how = {"n_bootstrap": wanted.n_bootstrap, "seed": config.seed}
        result["answers"] = answer_figures(prompts, measured.answers, **how)
        if wanted.judge.url:
            result["judge"] = _judge(config, measured)
    if wanted.published:
        result.setdefault("published", {})["url"] = wanted.published
    result["findings"] = findings(result)
    return result


def _judge(config: RunConfig, measured: Measured) -> dict[str, Any]:
    wanted = config.evaluation
    sft, policy = measured.answers["sft"], measured.answers["policy"]
    matches = [
        Match(row.prompt, theirs, ours, len(policy[0][number].ids) - len(sft[0][number].ids))
        for number, (row, theirs, ours) in enumerate(
            zip(measured.rows, sft[1], policy[1], strict=True)
        )
    ]
    with track("evaluate", "verdicts", len(matches)) as bar:
        return judge(
            wanted.judge, matches, n_bootstrap=wanted.n_bootstrap, seed=config.seed, bar=bar
        )


def _pairs_hash(rows: list[Pair]) -> str:
    """Which pairs were measured: figures of equal hashes can be compared."""
    text = "\n".join(sorted(row.pair_id for row in rows))
    return hashlib.sha256(text.encode()).hexdigest()


def _pair_rows(held_out: HeldOut, config: RunConfig, rows: list[Pair]) -> dict[str, Any]:
    """The figures of each pair, by column, for comparisons on the same pairs."""
    prompts = [hashlib.sha256(row.prompt.encode()).hexdigest()[:16] for row in rows]
    return {
        "pair_id": [row.pair_id for row in rows],
        "dataset": [row.dataset for row in rows],
        "prompt": prompts,
        **pair_values(held_out, config),
    }


def _samples(measured: Measured) -> list[dict[str, Any]]:
    found = []
    for number, row in enumerate(measured.rows):
        texts = {name: given[1][number] for name, given in measured.answers.items()}
        found.append(
            {
                "pair_id": row.pair_id,
                "dataset": row.dataset,
                "prompt": row.prompt,
                "chosen": row.chosen,
                "reward_change": measured.reward_change[number],
                **texts,
            }
        )
    return found


def _details(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that the UI shows as scalars."""
    details: dict[str, Any] = {
        "n_pairs": result["n_pairs"],
        "part": result["part"],
        "auc": result["calibration"]["auc"]["value"],
        "ece": result["calibration"]["ece"]["value"],
    }
    for side in ("before", "after", "change"):
        details[side] = {name: figure["value"] for name, figure in result[side].items()}
    if kl := result.get("kl"):
        details["kl_per_answer"] = kl["per_answer"]["value"]
    if answers := result.get("answers"):
        details["answers"] = {
            name: {key: answers[name][key]["value"] for key in ("tokens", "repetition", "empty")}
            for name in ("sft", "policy")
        }
    if (judged := result.get("judge")) and "win_rate" in judged:
        names = ("win_rate", "win_rate_length_controlled")
        details["judge"] = {name: judged[name]["value"] for name in names}
    return details


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False), "utf-8")
