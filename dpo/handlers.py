"""What each command does. Whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

from dpo.errors import ArtifactError, ConfigError, stopped_outside_of_steps, system_problem
from dpo.storage.host_memory import prepare
from dpo.storage.processes import told_to_end

REFUSED = 3
"""Exit code of a gate that refuses."""

Handler = Callable[[Any, dict[str, Path], argparse.Namespace], int]
"""Takes the composed configuration, the paths and the options; returns the exit code."""


def composed_of(settings: list[str], options: argparse.Namespace) -> Any:
    """The configuration that these settings make; its warnings are printed."""
    from dpo.config.compose import compose

    composed = compose(settings, user_dir=options.config_dir)
    for warning in composed.warnings:
        print(f"dpo: {warning}", file=sys.stderr)
    return composed


def plan(words: list[str], paths: dict[str, Path], options: argparse.Namespace) -> int:
    """``dpo plan``: what is no setting is about the machine."""
    from dpo.plan.command import run, take_keys

    own, settings = take_keys(words)
    config = composed_of(settings, options).config
    return run(config, own, paths.get("data"), as_json=options.output == "json")


def _ingest(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.config.stages import restrict
    from dpo.data.stage import run_ingest

    config = restrict(composed.config, "ingest")
    if {"shard", "shards"} <= paths.keys():
        raise ConfigError(
            "shard= reads a share of the sources, shards= puts the shares together",
            where="shards",
            fix="give shard=I/N to N commands, and shards= to one more after them",
        )
    if "shard" in paths:
        from dpo.data.shards import parse_shard, run_shard

        run_shard(config, paths["output"], parse_shard(str(paths["shard"])))
        print(f"shard: {paths['output']}")
        return 0
    run_ingest(config, paths["output"], shards=_folders(paths.get("shards")))
    print(f"pairs and report: {paths['output']}")
    return 0


def _folders(given: Path | None) -> list[Path]:
    """Folders of a list with commas or of a glob."""
    if given is None:
        return []
    # Path.glob takes no absolute pattern
    found = [sorted(glob(text)) for text in str(given).split(",")]  # noqa: PTH207
    folders = [Path(name) for names in found for name in names]
    if not folders:
        raise ConfigError(f"no folder is shards={given}", fix="name the outputs of all shards")
    return folders


def check(options: argparse.Namespace, settings: list[str]) -> int:
    """``dpo ingest --check``."""
    from dpo.data.check_file import check_file

    as_json = options.output == "json"
    return check_file(options.check, settings, options.config_dir, as_json=as_json)


def _tokenize(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.config.places import tokens_dir
    from dpo.data.tokenize import load_tokenizer
    from dpo.data.tokens import fill_cache
    from dpo.storage.base_model import local_tokenizer
    from dpo.storage.manifest import read_manifest

    read_manifest(paths["data"], stage="ingest")
    model = composed.config.model
    place = local_tokenizer(model)
    tokenizer = load_tokenizer(place, trust_remote_code=model.trust_remote_code)
    try:
        folder = fill_cache(paths["data"], tokenizer)
    except OSError as error:
        raise ArtifactError(
            f"the cache cannot be written: {system_problem(error).found}",
            where=str(tokens_dir()),
            fix="make room, or set DPO_TOKENS_DIR to another folder; the other steps work without",
        ) from None
    if folder is None:
        raise ConfigError(
            "there is nothing to keep: this tokenizer has no fast form",
            where=str(place),
            fix="leave this command out: the other steps work without",
        )
    details = read_manifest(folder, verify=False).details
    print(f"{details['pairs']:,} pairs, {details['tokens']:,} tokens: {folder}")
    return 0


def _train(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    prepare()
    with told_to_end(stopped_outside_of_steps()):
        from dpo.train.direct import train_directly

        output = train_directly(composed.config, **paths)
    print(f"checkpoint: {output}")
    return 0


def _reference(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    prepare()
    from dpo.config.stages import restrict
    from dpo.storage.fingerprint import code_fingerprint
    from dpo.train.reference import run_reference

    config = restrict(composed.config, "reference")
    run_reference(
        config,
        paths["output"],
        pairs=paths["data"],
        model=paths.get("base"),
        # `dpo train` in the same folder scores anew what other code scored
        code=code_fingerprint("reference"),
    )
    print(f"log-probabilities: {paths['output']}")
    return 0


def _evaluate(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    prepare()
    from dpo.config.stages import restrict
    from dpo.evaluate.stage import run_evaluate
    from dpo.publish.pinned import pinned

    config = restrict(composed.config, "evaluate")
    with pinned(config.evaluation.published) as published:
        run_evaluate(
            config,
            paths["output"],
            pairs=paths["data"],
            sft=paths["sft"],
            policy=paths["policy"],
            reference=paths.get("reference"),
            published=published,
        )
    print(f"report: {paths['output'] / 'report.html'}")
    return 0


def _gate(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.config.stages import restrict
    from dpo.evaluate.gate import run_gate

    config = restrict(composed.config, "gate")
    verdict = run_gate(config, paths["output"], evaluation=paths["evaluation"])
    for rule in verdict.rules:
        print(f"{'passed' if rule.passed else 'failed'}: {rule.explanation}")
    how = " (forced)" if verdict.forced else " (unchanged)" if verdict.unchanged else ""
    print(f"approved{how}" if verdict.approved else "refused")
    return 0 if verdict.approved else REFUSED


def _publish(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.config.stages import restrict
    from dpo.publish.runs import record_verdict, refuse_other_policy
    from dpo.publish.stage import approved_inputs, run_publish

    config = restrict(composed.config, "publish")
    run_id = composed.config.exp_name
    policy, evaluation, verdict = paths["policy"], paths["evaluation"], paths["verdict"]
    # what is recorded of another run stays: single steps have one run id unless they are given one
    trained = approved_inputs(policy, evaluation, verdict)[0]
    refuse_other_policy(config.publish, run_id, trained.content_hash)
    record_verdict(config.publish, run_id, evaluation=evaluation, verdict=verdict)
    run_publish(
        config,
        paths["output"],
        policy=policy,
        evaluation=evaluation,
        verdict=verdict,
        run_id=run_id,
    )
    print((paths["output"] / "published.json").read_text(encoding="utf-8"))
    return 0


def _export(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.modeling.export import export_policy

    trusted = composed.config.model.trust_remote_code
    written = export_policy(paths["checkpoint"], paths["output"], trust_remote_code=trusted)
    print(f"policy.pt: {written}")
    return 0


def _config(composed: Any, _: dict[str, Path], options: argparse.Namespace) -> int:
    import json

    values = composed.config.model_dump(mode="json")
    if options.json or options.output == "json":
        print(json.dumps({"config": values, "origins": dict(composed.origins)}, indent=1))
        return 0
    from dpo.config.compose import flatten

    flat = flatten(values)
    width = max(map(len, flat))
    shown = {key: json.dumps(value, ensure_ascii=False) for key, value in flat.items()}
    value_width = min(40, max(map(len, shown.values())))
    for key, text in shown.items():
        print(f"{key:{width}}  {text:{value_width}}  {composed.origins[key]}")
    return 0


def _fetch(composed: Any, _: dict[str, Path], __: argparse.Namespace) -> int:
    from dpo.errors import ModelError
    from dpo.storage.base_model import is_here, local_model

    model = composed.config.model
    if is_here(model):
        folder = local_model(model)
    else:
        try:
            from dpo.modeling.obtain import obtain
        except ImportError:
            raise ModelError("the model is not here, and without torch it cannot be made") from None
        folder = obtain(model)
    print(f"{model.name_or_path} is in {folder}")
    return 0


RUNNERS: dict[str, Handler] = {
    "ingest": _ingest,
    "tokenize": _tokenize,
    "train": _train,
    "reference": _reference,
    "evaluate": _evaluate,
    "export": _export,
    "gate": _gate,
    "publish": _publish,
    "config": _config,
    "fetch": _fetch,
}
