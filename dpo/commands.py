"""The table of commands: what each does, which paths and options it takes, an example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ABOUT_PUBLISHED = ("verify", "pull", "list", "retain", "lineage", "forget")
"""These take a URL and settings of their own, not those of the configuration."""


PATHS = {
    "data": "output folder of ingest",
    "output": "folder to write the result to",
    "shard": "I/N: read this share of the sources only; all N go to shards=",
    "shards": "outputs of all shards, as a glob or with commas between: put them together",
    "base": "checkpoint or any Hugging Face folder to start from (default: model.archive, else "
    "the base model)",
    "reference": "output folder of reference",
    "sft": "checkpoint of the SFT stage, or any Hugging Face folder to compare with",
    "policy": "checkpoint of the preference stage, or any Hugging Face folder",
    "evaluation": "output folder of evaluate",
    "verdict": "output folder of gate",
    "checkpoint": "checkpoint of a training",
}


@dataclass(frozen=True)
class Option:
    """An option that starts with ``--``, as argparse takes it."""

    flag: str
    how: Mapping[str, Any]


_AS_JSON = Option(
    "--output", {"choices": ("text", "json"), "default": "text", "help": "form (default: text)"}
)


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
    options: tuple[Option, ...] = ()
    """Beside --config-dir."""
    takes: str = "[key=value ...] [--config-dir DIR]"
    """What follows its name."""
    own_paths: Mapping[str, str] = field(default_factory=dict)
    """What path keys mean to it where that is not what ``PATHS`` says."""


COMMANDS = {
    "ingest": Command(
        "Read preference data, validate every row and write Parquet pairs.",
        ("output", "shard", "shards"),
        ("output",),
        "datasets sources.NAME.path test_fraction max_rejected_share prompt_format max_length",
        "dpo ingest datasets=[pairs.jsonl] model=smollm2 output=out/data\n"
        "  dpo ingest --check pairs.jsonl",
        options=(
            Option(
                "--check",
                {
                    "metavar": "FILE",
                    "help": "say what is wrong with a file (or folder, URL) and end",
                },
            ),
            Option("--output", {**_AS_JSON.how, "help": "of --check (default: text)"}),
        ),
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
        ("data", "sft", "policy", "output"),
        "loss loss.beta n_eval_examples evaluation.part evaluation.n_samples "
        "evaluation.max_new_tokens evaluation.published evaluation.judge.url",
        "dpo evaluate data=out/data sft=out/sft policy=out/policy reference=out/reference "
        "output=out/evaluation",
        own_paths={"reference": "output folder of reference, made with sft= (default: made here)"},
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
        takes="RUN RUN... [output=FOLDER]",
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
        options=(
            Option(
                "--rollback",
                {
                    "action": "store_true",
                    "help": "go back to the version before: URL [version=]",
                },
            ),
        ),
    ),
    "export": Command(
        "Write a checkpoint as policy.pt of the DPO reference code.",
        ("checkpoint", "output"),
        ("checkpoint", "output"),
        "",
        "dpo export checkpoint=out/policy output=policy.pt",
        own_paths={"output": "file to write"},
    ),
    "plan": Command(
        "Say what a run will need: memory, FLOPs, time. Exit code 2 when it does not fit.",
        ("data",),
        (),
        "gpus gpu gpu_memory_gib utilisation pairs peak_tflops prompt_tokens chosen_tokens "
        "rejected_tokens; model trainer batch_size micro_batch_tokens activation_checkpointing",
        "dpo plan model=pythia28 trainer=FSDPTrainer gpus=4 gpu_memory_gib=80 datasets=[hh]",
        options=(_AS_JSON,),
    ),
    "config": Command(
        "Print every setting with its value and where it came from.",
        (),
        (),
        "any",
        "dpo config model=pythia28 loss=ipo",
        options=(_AS_JSON, Option("--json", {"action": "store_true", "help": "--output json"})),
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
        takes="URL",
    ),
    "pull": Command(
        "Fetch a published model into a folder, verified: dpo pull URL output=FOLDER.",
        ("output",),
        ("output",),
        "",
        "dpo pull s3://models/policy output=policy",
        takes="URL output=FOLDER",
    ),
    "list": Command(
        "List what is published at or below a URL: dpo list URL.",
        (),
        (),
        "",
        "dpo list s3://models",
        options=(_AS_JSON,),
        takes="URL [--output json]",
    ),
    "retain": Command(
        "Remove old versions and what interrupted publishers left: dpo retain URL keep=K.",
        (),
        (),
        "keep grace_hours (of versions that were never completed, default 1)",
        "dpo retain s3://models/policy keep=5",
        takes="URL keep=K [grace_hours=H]",
    ),
    "lineage": Command(
        "Print where a published model comes from, or what was made of a community's data.",
        (),
        (),
        "community",
        "dpo lineage s3://models/policy\n  dpo lineage s3://models community=NAME",
        options=(_AS_JSON,),
        takes="URL [community=NAME] [--output json]",
    ),
    "forget": Command(
        "Remove a community's data and list what still depends on it.",
        (),
        (),
        "community reports=true (also remove reports that show its text)",
        "dpo forget s3://models community=NAME",
        options=(_AS_JSON,),
        takes="URL community=NAME [reports=true] [--output json]",
    ),
}
