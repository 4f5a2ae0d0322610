"""The evaluation stage: held-out figures, samples of the models, the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.config.stages import stage_settings
from dpo.data.schema import Pair
from dpo.distributed.device import best_device
from dpo.distributed.launch import is_shared, launch
from dpo.distributed.together import is_first
from dpo.errors import ConfigError
from dpo.evaluate.answers import answer_figures
from dpo.evaluate.findings import findings
from dpo.evaluate.heldout import HeldOut, figures, pair_values
from dpo.evaluate.inputs import Inputs, loss_of, read_inputs
from dpo.evaluate.judge import Match, check_service, judge
from dpo.evaluate.measure import Measured, Measurement, Models
from dpo.evaluate.report import write_reports
from dpo.modeling.memory import enough_memory
from dpo.modeling.precision import compute_dtype, name_of, say_if_slow
from dpo.storage.given_model import FOREIGN, read_model
from dpo.storage.lineage import SFT_CHECKPOINT
from dpo.storage.manifest import (
    Manifest,
    check_place,
    read_manifest,
    staged,
    write_manifest,
)
from dpo.storage.model_folder import base_of, is_adapter
from dpo.storage.progress import message, track
from dpo.storage.provenance import made_by

FORMAT_VERSION = 2
"""Of ``evaluation.json``; 1 had ``before``, ``after``, ``n_pairs`` and ``chance`` alone."""


@enough_memory()
def run_evaluate(
    config: RunConfig,
    output: Path,
    *,
    pairs: Path,
    sft: Path,
    policy: Path,
    reference: Path | None = None,
    published: Path | None = None,
    code: str = "",
) -> Manifest:
    """Measure a policy against the SFT model and write figures, samples and report.

    Both may be any models with the same tokens, such as a model of the hub and what another program
    trained from it: the one is called the SFT model here, the other the policy.

    Where the one host has several GPUs (or ``DPO_PROCESSES``), and ``trainer`` is not BasicTrainer,
    each process loads the models and does a share of the pairs and answers.

    Args:
        config: Settings.
        output: Folder to make.
        pairs: Output of ingest.
        sft: Checkpoint of the SFT stage or any model's folder: the reference.
        policy: Checkpoint of the preference stage or any model's folder.
        reference: Log-probabilities of the SFT model on the held-out pairs; None makes them.
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
        optional = {"reference": reference, "published": published}
        paths |= {name: path for name, path in optional.items() if path}
        wait = config.process_timeout_seconds
        launch(run_evaluate, "evaluate", config, paths, code, timeout_seconds=wait)
        return read_manifest(output, stage="evaluate")
    given = read_inputs(config, pairs=pairs, sft=sft, policy=policy, reference=reference)
    if is_first():
        _say_types(config, given.manifests.get("reference"))
    measurement = Measurement(config, given.rows, given.examples, given.tokenizer)
    policy_base = _base_of_policy(given.manifests, sft) if is_adapter(policy) else None
    models = Models(sft, policy, published, policy_base, published_base, not given.before)
    measured = measurement.run(models)
    if not is_first():
        return Manifest("evaluate", (), "")
    held_out = HeldOut(
        prompts=[row.prompt for row in given.rows],
        before=given.before or measured.before,
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
                **{name: m.settings for name, m in given.shown().items() if m.settings},
                "evaluate": stage_settings(config, "evaluate"),
            },
            provenance=_provenance(given, code),
            curves=_curves(given, sft, policy),
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


def _say_types(config: RunConfig, reference: Manifest | None) -> None:
    device = best_device()
    dtype = compute_dtype(config.model, device)
    say_if_slow(dtype, device, "evaluate")
    ours, theirs = name_of(dtype), reference.details.get("compute_dtype") if reference else None
    if theirs not in (None, ours):
        message(
            "evaluate",
            f"the SFT model's log-probabilities come from products in {theirs}, the policy's will "
            f"from {ours}: rewards hold the difference of their rounding (without reference= both "
            "are scored here)",
        )


def _base_of_published(published: Path | None, sft: Path) -> Path | None:
    """What a published adapter is opened on; None where it can be found by its name.

    Raises:
        ConfigError: it was trained on another SFT model.
    """
    if published is None or not is_adapter(published):
        return None
    name, own = base_of(published), read_model(sft, "sft", verify=False).content_hash
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


def _provenance(given: Inputs, code: str) -> dict[str, dict[str, str]]:
    """Parents by content hash, fingerprints of data and code, and what made each of them."""
    manifests = given.manifests
    pairs = manifests["pairs"]
    sources = pairs.details.get("sources") or {}
    made = {name: _made_by(manifest.made_by) for name, manifest in given.shown().items()}
    codes = {name: manifest.code for name, manifest in given.shown().items()}
    return {
        "parents": {name: manifest.content_hash for name, manifest in manifests.items()},
        "data": {
            "held-out pairs": _pairs_hash(given.rows),
            **{name: str(fingerprint) for name, fingerprint in dict(sources).items()},
        },
        "made by": {**made, "evaluate": _made_by(made_by())},
        "code fingerprints": {**codes, "evaluate": code},
    }


def _curves(given: Inputs, sft: Path, policy: Path) -> dict[str, Path]:
    """What our steps left of a training; another program's file of that name is its own."""
    titles = {"sft": "SFT", "preference": "preference"}
    found = {}
    for name, folder in (("sft", sft), ("policy", policy)):
        title = titles.get(given.manifests[name].stage, "")
        if title:
            found[f"{name}: {title}" if title in found else title] = folder / "metrics.jsonl"
    return found


def _models(given: Inputs) -> dict[str, dict[str, Any]]:
    """Which models were measured."""
    return {
        name: {
            "step": (manifest := given.manifests[name]).stage,
            "content_hash": manifest.content_hash,
            **({} if manifest.settings else manifest.details.get("sources", {})),
            **({"end": given.ends[name]} if given.ends else {}),
            **_trained_on(given, manifest),
        }
        for name in ("sft", "policy")
    }


def _trained_on(given: Inputs, manifest: Manifest) -> dict[str, list[str]]:
    """Outputs of ingest that a model was trained on, but the one that is measured on; nothing where
    that was not recorded."""
    known = {hash_ for hash_, made in manifest.lineage.items() if made["step"] == "ingest"}
    known |= {manifest.inputs["pairs"]} if "pairs" in manifest.inputs else set()
    if manifest.stage == FOREIGN or not known:
        return {}
    return {"trained_on": sorted(known - {given.manifests["pairs"].content_hash})}


def _made_by(values: Mapping[str, Any]) -> str:
    names = ("version", "commit", "image", "processor")
    return ", ".join(f"{name} {values[name]}" for name in names if values.get(name))


def _result(
    config: RunConfig, held_out: HeldOut, measured: Measured, given: Inputs
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
            "loss": dict(loss_of(policy)) or None,
            "files": {entry.path: entry.sha256 for entry in policy.files},
        },
        "models": _models(given),
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
        Match(row.prompt, theirs, ours, len(policy[0][number].said) - len(sft[0][number].said))
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
