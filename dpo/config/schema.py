"""The types of every setting: what may be written in YAML or on a command line.

``config/schemas/*.json`` is generated from here (``make schemas``). Counts have no unit in their
names; everything else carries it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from dpo.config.base import LARGEST_INTEGER, Recorded, Section
from dpo.config.losses import AnyLoss, DPOLoss
from dpo.config.models import LoraConfig, ModelConfig, TrainerConfig
from dpo.config.places import chat_templates
from dpo.config.sources import SourceConfig

CheckpointingMode = Literal["none", "selective", "full"]


def _checkpointing_mode(value: object) -> object:
    """The reference code's boolean: true means full."""
    return {True: "full", False: "none"}.get(value, value) if isinstance(value, bool) else value


def is_template_file(value: str) -> bool:
    """Whether a chat template is named by its file: it is no known name, and no template itself."""
    return value not in chat_templates() and "{" not in value


def _template_text(value: str) -> str:
    """A template's file becomes its text, so that settings say what was used, wherever it lay."""
    if not is_template_file(value):
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError):
        # also ~ of nobody, a zero byte in the name, a text that is not UTF-8
        known = ", ".join(chat_templates())
        raise ValueError(
            f"chat_template={value}: choose one of {known}, or a file that can be read"
        ) from None


class WandbConfig(Section):
    """Weights & Biases."""

    enabled: bool = False
    """Log there as well."""
    entity: str | None = None
    """Team or user."""
    project: str = "direct-preference-optimization"
    """Project name."""


class JudgeConfig(Section):
    """A language model that compares the answers of policy and SFT model; off without ``url``."""

    url: str | None = Field(None, pattern=r"^https?://[^\s@?#]+$")
    """Base URL of an OpenAI-compatible service, such as ``http://judge:8000/v1``. Its key comes
    from the environment variable DPO_JUDGE_API_KEY (or OPENAI_API_KEY), never from here."""
    model: str = ""
    """Name of the judging model at that service."""
    instructions: str = ""
    """What makes an answer the better one; empty takes the shipped text."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Longest wait for one verdict."""
    n_tries: int = Field(4, gt=0)
    """Tries for one verdict when the service is busy (429), down or talks nonsense."""
    concurrency: int = Field(4, gt=0, le=64)
    """Requests at a time."""
    on_error: Literal["report", "fail"] = "report"
    """When the service does not judge: go on and say so in the report, or fail the step."""


class EvaluationConfig(Section):
    """Held-out figures and samples."""

    part: Literal["all", "validation", "test"] = "all"
    """Measure on all held-out pairs, or on one of two parts of them (by hash of the prompt): a
    sweep selects on ``validation``, the gate decides on ``test``."""
    validation_fraction: float = Field(0.5, gt=0, lt=1)
    """Share of the held-out prompts in the validation part."""
    n_samples: int = Field(4, ge=0)
    """Held-out prompts that SFT model and policy both answer."""
    max_new_tokens: int = Field(64, gt=0)
    """Longest sampled answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling."""
    batch_size: int = Field(16, gt=0)
    """Prompts answered at a time; answers do not depend on it."""
    n_kl_samples: int = Field(16, ge=0)
    """Answers sampled from the policy (temperature 1) to estimate its KL divergence from the SFT
    model; 0 leaves it out."""
    n_bootstrap: int = Field(1000, ge=100)
    """Resamples of the prompts for each 95 % interval."""
    published: str | None = None
    """URL of one published version (``.../NAME/CONTENT_HASH``) to measure and sample beside policy
    and SFT model. A name without its version is refused: this step is cached, and what is
    published changes."""
    judge: JudgeConfig = JudgeConfig()
    """Pairwise win rate by a language model."""

    @field_validator("published")
    @classmethod
    def _one_version(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z0-9]+://.+/[0-9a-f]{64}/?", value):
            raise ValueError(
                f"evaluation.published={value} names no version: write .../NAME/CONTENT_HASH (64 "
                "hex digits; `dpo verify .../NAME` prints the latest)"
            )
        return value

    @model_validator(mode="after")
    def _judge_has_a_model(self) -> EvaluationConfig:
        if self.judge.url and not self.judge.model:
            raise ValueError(
                "evaluation.judge.url is set, but evaluation.judge.model is not: name the model"
            )
        if self.judge.url and not self.n_samples:
            raise ValueError(
                "evaluation.judge.url is set, but evaluation.n_samples is 0: nothing to judge"
            )
        return self


class GateConfig(Section):
    """Rules that a policy must pass before it is published; the first is always on, of the others
    one that is null is off."""

    min_reward_accuracy: float = Field(0.5, ge=0, le=1)
    """The lower 95 % bound of held-out reward accuracy must exceed this."""
    min_improvement: float | None = Field(None, ge=-1, le=1)
    """Reward accuracy must exceed that of the published version by at least this; passes while
    nothing is published."""
    max_kl: float | None = Field(None, gt=0)
    """Largest KL divergence from the SFT model, in nats an answer."""
    max_length_growth: float | None = Field(None, gt=0)
    """Largest mean length of the policy's answers, as a multiple of the SFT model's."""
    max_repetition: float | None = Field(None, ge=0, le=1)
    """Largest mean share of repeated 4-grams in the policy's answers."""
    max_perplexity_growth: float | None = Field(None, gt=0)
    """Largest perplexity of the policy on chosen responses, as a multiple of the SFT model's."""
    force: bool = False
    """Publish although a rule fails; recorded in the verdict."""


_LAYOUT = {"runs", "communities", "data", "publishing", "retiring", "latest.json", "manifest.json"}
"""What a store itself calls its folders and files (dpo/publish/README.md)."""


def _free_name(value: str) -> str:
    """Not a name that stands for something else in a store; 64 hex digits are a version's."""
    if value in _LAYOUT or re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(
            f"publish.name={value} is what the store itself calls a part of it: choose another name"
        )
    return value


class PublishConfig(Section):
    """Where the model goes."""

    store: str | None = None
    """``file://``, ``s3://``, ``minio://`` or ``gs://`` URL with bucket and optional prefix."""
    name: Annotated[str, AfterValidator(_free_name)] = Field(
        "policy", pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"
    )
    """Name under which the model is published."""
    create_bucket: bool = False
    """Create the bucket where it does not exist."""
    max_shard_mib: int = Field(2048, gt=0)
    """Largest file of weights, in MiB; larger ones are divided when they are published."""
    lora: Literal["merged", "adapter"] = "merged"
    """How a model trained as an adapter is published: merged into its base, or alone."""
    license: Annotated[str, AfterValidator(str.lower)] = Field(
        "", pattern=r"^[A-Za-z0-9.+-]{0,64}$"
    )
    """Licence of the model on its card, as hubs or SPDX write it (apache-2.0, MIT); empty takes the
    base model's where it is known, else ``other``."""
    registry: str | None = Field(None, pattern=r"^https?://")
    """Address of Kubeflow's Model Registry, where the version is registered too."""
    retry_seconds: float = Field(120.0, gt=0, le=86400)
    """How long a request is repeated while the store does not answer."""
    deadline_seconds: float = Field(21600.0, gt=0, le=86400)
    """How long publishing may take in all."""


class RunConfig(Recorded):
    """All settings of a run. Names and meanings follow the reference code where it has them."""

    # What to train
    model: ModelConfig = ModelConfig()
    """Base model and starting weights."""
    loss: AnyLoss = DPOLoss()
    """``loss=sft`` trains the SFT stage, any other one the preference stage."""
    trainer: TrainerConfig = TrainerConfig()
    """Process layout."""
    lora: LoraConfig = LoraConfig()
    """Train an adapter instead of all weights."""

    # Data
    datasets: list[str] = ["hh_sample"]
    """Names of ``dataset/`` entries, or files, folders and URLs."""
    sources: dict[str, SourceConfig] = {}
    """The sources behind ``datasets``, filled in when the configuration is composed."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of prompts held out, by hash of the prompt, where a source has no split of its own."""
    max_rejected_share: float = Field(0.05, ge=0, le=1)
    """Ingest fails when a larger share of rows is rejected."""
    bad_rows: Literal["fail", "drop"] = "fail"
    """``fail`` stops above ``max_rejected_share``, ``drop`` leaves out any number of bad rows. They
    are in the quarantine with their reasons either way."""
    prompt_format: Literal["raw", "chat"] = "raw"
    """Dialogue text as it is, or through the tokenizer's chat template."""
    chat_template: Annotated[str, AfterValidator(_template_text)] | None = None
    """With ``prompt_format=chat``, instead of the tokenizer's own template: ``chatml``, ``llama3``,
    ``zephyr``, or a file in Jinja."""
    max_length: int = Field(512, gt=1)
    """Longest prompt + response, in tokens."""
    max_prompt_length: int = Field(256, gt=0)
    """What a prompt is cut to when prompt + response exceed ``max_length``, in tokens."""
    truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """Which end of a too long prompt survives."""

    # Optimisation
    batch_size: int = Field(4, gt=0)
    """Examples in an optimiser step, over all processes and accumulation steps."""
    eval_batch_size: int = Field(16, gt=0)
    """Examples in an evaluation batch; rows are packed by ``micro_batch_tokens`` instead, and the
    figures do not depend on either."""
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-batches in an optimiser step."""
    micro_batch_tokens: int | None = Field(None, gt=0)
    """Tokens that go through the model at once; a smaller number needs less memory. Micro-batches
    are split further to stay within it, which changes no gradient. Left out: 2,048 on a CPU, on a
    GPU the most up to 16,384 that `dpo plan` expects to fit."""
    n_epochs: int | None = Field(1, ge=0)
    """Passes over the training pairs. 0 leaves SFT out: the model goes on as it is."""
    n_examples: int | None = Field(None, gt=0)
    """Stop after so many training examples, if that comes before ``n_epochs``."""
    lr: float = Field(5e-7, gt=0)
    """Learning rate after warm-up."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """After warm-up: constant as in the paper, or linear to zero at the last step."""
    warmup_steps: int = Field(150, ge=0)
    """Step s runs at lr * min(1, (s + 1) / (warmup_steps + 1))."""
    optimizer: Literal["RMSprop", "AdamW"] = "RMSprop"
    """RMSprop with torch's defaults as in the paper, or AdamW without weight decay."""
    max_grad_norm: float = Field(10.0, gt=0)
    """Gradients are scaled down to this L2 norm."""
    activation_checkpointing: Annotated[CheckpointingMode, BeforeValidator(_checkpointing_mode)] = (
        "none"
    )
    """Recompute activations in the backward pass; true means full."""
    deterministic: bool = True
    """On a GPU: train with operations that give the same bits each time, so that a run that goes on
    from a checkpoint ends with the same weights. false may be faster."""
    seed: int = Field(0, ge=0, le=LARGEST_INTEGER)
    """Order of the examples, choice of subsets, sampling."""

    score_training_pairs: bool = True
    """Let the reference stage score the training pairs too; the pipeline decides it by the loss."""

    # Evaluation while training
    eval_every: int = Field(20_000, ge=0)
    """Evaluate each time so many examples were trained on; 0 evaluates before and after only."""
    n_eval_examples: int | None = Field(256, gt=0)
    """Held-out pairs to evaluate on; null takes all."""
    do_first_eval: bool = True
    """Evaluate before the first step."""
    do_last_eval: bool = True
    """Evaluate after the last step."""
    sample_during_eval: bool = False
    """Generate answers in each evaluation while training."""
    n_eval_model_samples: int = Field(16, gt=0)
    """How many answers ``sample_during_eval`` generates."""

    # Checkpoints, logs, places
    checkpoint_every: int = Field(0, ge=0)
    """Write a checkpoint each time so many examples were trained on; 0 goes by time alone."""
    checkpoint_seconds: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Write a checkpoint each time so many seconds have passed; 0 goes by examples alone. ``auto``
    writes the first after 10 seconds and measures it: later ones stop the training for 1 % of the
    time, are being written for 20 % of it at most, and come within an hour."""
    checkpoint_uri: str | None = None
    """Folder or store (``s3://bucket/prefix``) for checkpoints, each run in a place of its own
    below it, named by its settings, data and code. Beside the run, or in DPO_CHECKPOINTS, when left
    out."""
    resume: Literal["auto", "force", "never"] = "auto"
    """Go on from the run's own checkpoints, from whatever checkpoints are there, or begin again."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many periodic checkpoints to keep."""
    exp_name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run: folder and wandb name."""
    local_dirs: list[str] = [".cache"]
    """Folders to keep runs in; the first that can be written to is used."""
    local_run_dir: str | None = None
    """Folder of this run; chosen under ``local_dirs`` when left out."""
    debug: bool = False
    """No wandb, no periodic checkpoints; the final artifact is still written."""
    minimum_log_interval_secs: float = Field(1.0, ge=0)
    """Shortest time between two lines on the terminal or in wandb, in seconds."""
    fsdp_port: int | None = Field(None, ge=1024, le=65535)
    """Port of the rendezvous; a free one when left out."""
    process_timeout_seconds: int = Field(600, ge=5)
    """Training over several processes ends when a host does not come, or one of them does not
    answer, for so long."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: str | None = None
    """Folder for TensorBoard's event files, each run in a folder of its own below it; none is
    written when left out."""

    # After training
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out figures and samples."""
    gate: GateConfig = GateConfig()
    """What a policy must reach to be published."""
    publish: PublishConfig = PublishConfig()
    """Where the model goes."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length "
                f"({self.max_length}): nothing would be left for the response"
            )
        if self.batch_size % (steps := self.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of "
                f"gradient_accumulation_steps ({steps}), as "
                f"batch_size={-(-self.batch_size // steps) * steps} is"
            )
        figures = {
            "max_kl": "n_kl_samples",
            "max_length_growth": "n_samples",
            "max_repetition": "n_samples",
        }
        for rule, source in figures.items():
            if getattr(self.gate, rule) is not None and not getattr(self.evaluation, source):
                raise ValueError(
                    f"gate.{rule} is set, but evaluation.{source} is 0: the gate would have no "
                    "figure to judge"
                )
        if self.n_epochs is None and self.n_examples is None:
            raise ValueError("one of n_epochs and n_examples must be set: training would not end")
        if self.n_epochs == 0 and self.loss.name != "sft":
            raise ValueError("n_epochs=0 leaves out SFT alone: preference training needs a pass")
        return self
