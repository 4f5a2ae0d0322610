"""Settings of the model, of LoRA and of how the work is spread."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dpo.config.base import Section

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """The base model, and the weights to start from."""

    name_or_path: str = "builtin:tiny"
    """Hub id, folder, or ``builtin:NAME`` for a model that travels with this package."""
    tokenizer_name_or_path: str | None = None
    """Tokenizer to use when it is not the model's own."""
    revision: str | None = None
    """Commit or tag of the model on the hub, where that is not the newest. A pipeline run whose
    model changes between its plan and SFT is refused."""
    archive: str | None = None
    """Weights to start from: a ``policy.pt``, a checkpoint folder of ours, or its ``LATEST``."""
    block_name: str | None = None
    """Class name of a transformer block (FSDP unit); found from the model when left out."""
    policy_dtype: Dtype = "float32"
    """Type of the master weights of the policy."""
    reference_dtype: Dtype = "float32"
    """Type of the reference's weights; differs from ``policy_dtype`` only by explicit choice."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; ``auto`` takes bfloat16 where the processor has it in hardware."""
    kernels: Literal["auto", "plain", "liger"] = "auto"
    """``auto`` runs norms, gated layers and attention in our own few passes over memory where they
    fit the model; ``plain`` as transformers has them; ``liger`` with the package liger-kernel (on a
    GPU)."""
    output_layer: Literal["tiled", "torch"] = "tiled"
    """Log-probabilities from hidden states: by tiles of the vocabulary, or by torch's chunked
    linear_cross_entropy. Neither keeps the logits of a row."""
    compile: bool = False
    """Compile each transformer block for rows of fixed lengths (torch.compile; needs a C++ compiler
    on a CPU, and takes a minute at the start)."""
    fsdp_policy_mp: Dtype | None = None
    """Mixed precision of the FSDP trainer (overrides ``compute_dtype`` there)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for a source you trust."""


class LoraConfig(Section):
    """LoRA: train small matrices beside those of the model, which stays as it is."""

    enabled: bool = False
    """Train an adapter instead of all weights; the base is then its own reference."""
    rank: int = Field(16, ge=1, le=4096)
    """Rank of each change."""
    alpha: float = Field(32.0, gt=0)
    """A change counts alpha / rank times."""
    modules: Literal["all"] | list[str] = "all"
    """Linear layers of the blocks to change, by the last part of their names (``q_proj``)."""
    save: Literal["merged", "adapter"] = "merged"
    """Write the whole model with the adapter added, or the adapter alone with its base recorded."""


class TrainerConfig(Section):
    """How the work is spread over processes and devices."""

    name: Literal["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"] = "BasicTrainer"
    """One process, sharded data parallel, or tensor parallel."""
    replicas: int = Field(1, ge=1)
    """FSDPTrainer: so many groups of processes hold the whole model each (hybrid sharding). With
    one group a host, weights stay within hosts and only gradients cross them."""
    tensor_parallel: int | None = Field(None, ge=2)
    """TensorParallelTrainer: how many processes share each layer; the rest is sharded data parallel
    (FSDP) around them. All processes when left out."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> TrainerConfig:
        if self.replicas > 1 and self.name != "FSDPTrainer":
            raise ValueError(f"trainer.replicas belongs to FSDPTrainer, not to {self.name}")
        if self.tensor_parallel and self.name != "TensorParallelTrainer":
            raise ValueError(
                f"trainer.tensor_parallel belongs to TensorParallelTrainer, not to {self.name}"
            )
        return self
