"""The command line: ``dpo <stage> [key=value ...]``.

Nothing heavy is imported until a stage runs, so ``--help`` and a typo answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from dpo.errors import ConfigError, DpoError, system_problem

INTERRUPTED = 130
REFUSED = 3

_ABOUT_PUBLISHED = ("verify", "pull", "list", "retain", "lineage", "forget")

PATHS = {
    "data": "output folder of ingest",
    "output": "folder to write the result to",
    "shard": "I/N: read this share of the sources only; all N go to shards=",
    "shards": "outputs of all shards, as a glob or with commas between: put them together",
    "base": "checkpoint to start from (default: model.archive, else the base model)",
    "reference": "output folder of reference",
    "sft": "checkpoint of the SFT stage",
    "policy": "checkpoint of the preference stage",
    "evaluation": "output folder of evaluate",
    "verdict": "output folder of gate",
    "checkpoint": "checkpoint of a training",
}


@dataclass(frozen=True)
class Command:
    """One word after ``dpo``."""

    summary: str
    paths: tuple[str, ...]
    """Path keys that it takes."""
    required: tuple[str, ...]
    keys: str
    """The settings that people change most."""
    example: str


COMMANDS = {
    "ingest": Command(
        "Read preference data, validate every row and write Parquet pairs.",
        ("output", "shard", "shards"),
        ("output",),
        "datasets sources.NAME.path test_fraction max_rejected_share prompt_format max_length",
        "dpo ingest datasets=[pairs.jsonl] model=smollm2 output=out/data\n"
        "  dpo ingest --check pairs.jsonl",
    ),
    "tokenize": Command(
        "Tokenise the pairs of ingest into the cache that the later steps share.",
        ("data",),
        ("data",),
        "model model.tokenizer_name_or_path",
        "dpo tokenize data=out/data model=smollm2",
    ),
    "train": Command(
        "Train: SFT with loss=sft, else a preference loss.",
        ("data", "base", "reference", "output"),
        (),
        "model loss loss.beta datasets batch_size n_epochs n_examples lr warmup_steps optimizer "
        "gradient_accumulation_steps model.archive exp_name seed",
        "dpo train model=smollm2 loss=dpo loss.beta=0.1 datasets=[hh] model.archive=out/sft",
    ),
    "reference": Command(
        "Score pairs with the reference model, once for every loss and beta.",
        ("data", "base", "output"),
        ("data", "output"),
        "model model.archive n_examples n_eval_examples seed",
        "dpo reference data=out/data base=out/sft output=out/reference",
    ),
    "evaluate": Command(
        "Measure a policy on held-out pairs and write the report.",
        ("data", "sft", "policy", "reference", "output"),
        ("data", "sft", "policy", "reference", "output"),
        "loss loss.beta n_eval_examples evaluation.part evaluation.n_samples "
        "evaluation.max_new_tokens evaluation.published evaluation.judge.url",
        "dpo evaluate data=out/data sft=out/sft policy=out/policy reference=out/reference "
        "output=out/evaluation",
    ),
    "gate": Command(
        "Decide whether a policy may be published; exit code 3 when it may not.",
        ("evaluation", "output"),
        ("evaluation", "output"),
        "gate.min_reward_accuracy gate.min_improvement gate.max_kl gate.max_length_growth "
        "gate.max_repetition gate.max_perplexity_growth gate.force publish.store publish.name",
        "dpo gate evaluation=out/evaluation output=out/verdict",
    ),
    "compare": Command(
        "Compare evaluated runs: dpo compare RUN RUN... [output=FOLDER].",
        ("output",),
        (),
        "",
        "dpo compare out/beta-0.1/evaluation out/beta-0.3/evaluation output=comparison\n"
        "  dpo compare s3://models/team/runs/ID s3://models/team/runs/ID",
    ),
    "publish": Command(
        "Publish an approved policy to a store.",
        ("policy", "evaluation", "verdict", "output"),
        ("policy", "evaluation", "verdict", "output"),
        "publish.store publish.name publish.create_bucket publish.registry (registry= for short) "
        "exp_name (the run's id in the store)",
        "dpo publish policy=out/policy evaluation=out/evaluation verdict=out/verdict "
        "publish.store=s3://models output=out/published\n"
        "  dpo publish --rollback s3://models/policy [version=HASH]",
    ),
    "export": Command(
        "Write a checkpoint as policy.pt of the DPO reference code.",
        ("checkpoint", "output"),
        ("checkpoint", "output"),
        "",
        "dpo export checkpoint=out/policy output=policy.pt",
    ),
    "plan": Command(
        "Say what a run will need: memory, FLOPs, time. Exit code 2 when it does not fit.",
        ("data",),
        (),
        "gpus gpu gpu_memory_gib utilisation pairs peak_tflops prompt_tokens chosen_tokens "
        "rejected_tokens; model trainer batch_size micro_batch_tokens activation_checkpointing",
        "dpo plan model=pythia28 trainer=FSDPTrainer gpus=4 gpu_memory_gib=80 datasets=[hh]",
    ),
    "config": Command(
        "Print every setting with its value and where it came from.",
        (),
        (),
        "any",
        "dpo config model=pythia28 loss=ipo",
    ),
    "fetch": Command(
        "Bring the base model onto this machine.", (), (), "model", "dpo fetch model=smollm2"
    ),
    "verify": Command(
        "Re-hash a published model, and check its signature: dpo verify URL.",
        (),
        (),
        "",
        "dpo verify s3://models/policy",
    ),
    "pull": Command(
        "Fetch a published model into a folder, verified: dpo pull URL output=FOLDER.",
        ("output",),
        ("output",),
        "",
        "dpo pull s3://models/policy output=policy",
    ),
    "list": Command(
        "List what is published at or below a URL: dpo list URL.",
        (),
        (),
        "format=json",
        "dpo list s3://models",
    ),
    "retain": Command(
        "Remove old versions and what interrupted publishers left: dpo retain URL keep=K.",
        (),
        (),
        "keep grace_hours (of versions that were never completed, default 1)",
        "dpo retain s3://models/policy keep=5",
    ),
    "lineage": Command(
        "Print where a published model comes from, or what was made of a community's data.",
        (),
        (),
        "community format=json",
        "dpo lineage s3://models/policy\n  dpo lineage s3://models community=NAME",
    ),
    "forget": Command(
        "Remove a community's data and list what still depends on it.",
        (),
        (),
        "community reports=true (also remove reports that show its text) format=json",
        "dpo forget s3://models community=NAME",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(given)
    except DpoError as error:
        print(f"dpo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ndpo: stopped; nothing half-written was kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"dpo: {system_problem(error)}", file=sys.stderr)
        return 1


def _main(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name == "--version":
        from dpo import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"there is no command {name!r}{hint}", fix=f"choose one of {', '.join(COMMANDS)}"
        )
    options, overrides = _options(name).parse_known_args(rest)
    stray = [text for text in overrides if text.startswith("-")]
    if stray:
        raise ConfigError(
            f"unknown option {stray[0]}", fix=f"settings are key=value; see `dpo {name} --help`"
        )
    return _run(name, options, overrides)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpo COMMAND [key=value ...] [--config-dir DIR]",
            "",
            "Preference fine-tuning: SFT, then DPO, conservative DPO or IPO.",
            "",
            *lines,
            "",
            "`dpo COMMAND --help` explains one; `dpo config` prints all settings.",
        ]
    )


def _options(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    lines = [f"example:\n  {command.example}"]
    if command.paths:
        shown = [
            f"  {path}=  {PATHS[path]}{'' if path in command.required else ' (optional)'}"
            for path in command.paths
        ]
        lines.append("paths:\n" + "\n".join(shown))
    if command.keys:
        lines.append(f"often used settings:\n  {command.keys}\n`dpo config` prints all of them.")
    parser = argparse.ArgumentParser(
        prog=f"dpo {name}",
        usage=f"dpo {name} [key=value ...] [--config-dir DIR]",
        description=command.summary,
        epilog="\n\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-dir", type=Path, help="folder with choices of your own, such as model/mine.yaml"
    )
    if name == "ingest":
        parser.add_argument(
            "--check", metavar="FILE", help="say what is wrong with a file (or folder, URL) and end"
        )
        parser.add_argument(
            "--output", choices=("text", "json"), default="text", help="of --check (default: text)"
        )
    if name == "publish":
        parser.add_argument(
            "--rollback", action="store_true", help="go back to the version before: URL [version=]"
        )
    if name == "plan":
        parser.add_argument(
            "--output", choices=("text", "json"), default="text", help="form (default: text)"
        )
    if name == "config":
        parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def _run(name: str, options: argparse.Namespace, overrides: list[str]) -> int:
    command = COMMANDS[name]
    if name in _ABOUT_PUBLISHED or (name == "publish" and options.rollback):
        from dpo.publish.command import run

        which = "publish --rollback" if name == "publish" else name
        return run(which, overrides, command.example)
    if name == "compare":
        from dpo.evaluate.compare import run_compare

        return run_compare(overrides)
    if name == "ingest" and options.check:
        return _check(options, overrides)
    paths = {}
    settings = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if key in command.paths and separator:
            paths[key] = Path(value).expanduser()
        elif key == "registry" and name == "publish":
            settings.append(f"publish.{text}")
        elif key in PATHS and separator:
            raise ConfigError(
                f"dpo {name} takes no {key}=",
                fix=f"it takes {', '.join(f'{path}=' for path in command.paths) or 'no paths'}",
            )
        else:
            settings.append(text)
    missing = [path for path in command.required if path not in paths]
    if missing:
        raise ConfigError(
            f"dpo {name} needs {missing[0]}= ({PATHS[missing[0]]})", fix=command.example
        )
    if name == "plan":
        return _plan(settings, paths, options)
    composed = _composed(settings, options)
    runner: Callable[[Any, dict[str, Path], argparse.Namespace], int] = _RUNNERS[name]
    return runner(composed, paths, options)


def _composed(settings: list[str], options: argparse.Namespace) -> Any:
    from dpo.config.compose import compose

    composed = compose(settings, user_dir=options.config_dir)
    for warning in composed.warnings:
        print(f"dpo: {warning}", file=sys.stderr)
    return composed


def _plan(words: list[str], paths: dict[str, Path], options: argparse.Namespace) -> int:
    from dpo.plan.command import run, take_keys

    own, settings = take_keys(words)
    config = _composed(settings, options).config
    return run(config, own, paths.get("data"), as_json=options.output == "json")


def _ingest(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.config.stages import restrict
    from dpo.data.stage import run_ingest

    config = restrict(composed.config, "ingest")
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


def _check(options: argparse.Namespace, settings: list[str]) -> int:
    from dpo.data.check_file import check_file

    return check_file(options.check, settings, options.config_dir, as_json=options.output == "json")


def _tokenize(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.data.tokenize import load_tokenizer
    from dpo.data.tokens import fill_cache
    from dpo.storage.base_model import local_tokenizer
    from dpo.storage.manifest import read_manifest

    read_manifest(paths["data"], stage="ingest")
    place = local_tokenizer(composed.config.model)
    folder = fill_cache(paths["data"], load_tokenizer(place))
    if folder is None:
        raise ConfigError(
            "there is nothing to keep: this tokenizer has no fast form, or the cache folder cannot "
            "be written",
            where=str(place),
            fix="set DPO_CACHE_DIR to a folder that can be written; the other steps work without",
        )
    details = read_manifest(folder, verify=False).details
    print(f"{details['pairs']:,} pairs, {details['tokens']:,} tokens: {folder}")
    return 0


def _train(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.train.direct import train_directly

    output = train_directly(composed.config, **paths)
    print(f"checkpoint: {output}")
    return 0


def _reference(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
    from dpo.config.stages import restrict
    from dpo.train.reference import run_reference

    config = restrict(composed.config, "reference")
    run_reference(config, paths["output"], pairs=paths["data"], model=paths.get("base"))
    print(f"log-probabilities: {paths['output']}")
    return 0


def _evaluate(composed: Any, paths: dict[str, Path], _: argparse.Namespace) -> int:
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
            reference=paths["reference"],
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
    from dpo.publish.runs import record_verdict
    from dpo.publish.stage import run_publish

    config = restrict(composed.config, "publish")
    run_id = composed.config.exp_name
    record_verdict(config.publish, run_id, evaluation=paths["evaluation"], verdict=paths["verdict"])
    run_publish(
        config,
        paths["output"],
        policy=paths["policy"],
        evaluation=paths["evaluation"],
        verdict=paths["verdict"],
        run_id=run_id,
    )
    print((paths["output"] / "published.json").read_text(encoding="utf-8"))
    return 0


def _export(_: Any, paths: dict[str, Path], __: argparse.Namespace) -> int:
    from dpo.modeling.export import export_policy

    print(f"policy.pt: {export_policy(paths['checkpoint'], paths['output'])}")
    return 0


def _config(composed: Any, _: dict[str, Path], options: argparse.Namespace) -> int:
    import json

    values = composed.config.model_dump(mode="json")
    if options.json:
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


_RUNNERS = {
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
