"""Peak memory of one device in training, by an account of what is kept.

Per device, with n devices that share the weights (n = 1 for one process), of which t split each
layer (tensor parallelism; t = 1 else) and n / t gather it (FSDP):

    weights      P x bytes of policy_dtype / n; with FSDP also two gathered blocks and the gathered
                 embeddings; with autocast the copies in the type of the products
    gradients    trained weights x 4 / n; with FSDP also one block before and while it is reduced
    optimiser    RMSprop one value a trained weight, AdamW two, in the weights' type
    activations  tokens of a micro-batch x blocks x (a D + k K + b F) bytes, K the width of all
                 key/value heads, a, k and b by architecture and type (``_SAVED``), or one block
                 and the inputs of the others where they are computed again; and what backward
                 works with
    logits       a tile of response tokens x vocabulary, and the gradient of the output weights;
                 all logits where the architecture takes the padded path

What is gathered, cast or multiplied is a t-th with tensor parallelism, and so are activations of F
and logits; those of D are taken as whole, though the heads' are not.

The reference's log-probabilities are cached, so there is no second model. ``a``, ``k`` and ``b``
count the tensors that autograd keeps, read from runs under fake tensors;
tests/train/test_simulate.py compares the whole with a simulated step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dpo.plan.shape import Architecture

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Mode = Literal["float32", "autocast", "half"]
"""float32 products; 16-bit products of float32 weights; 16-bit weights and products (FSDP)."""

PACKED_TYPES = (
    *("gpt_neox", "llama", "gpt2", "mistral"),
    *("qwen2", "qwen3", "gemma", "olmo2", "phi", "phi3", "opt"),
)
"""``model_type`` of the models whose rows share prompts (dpo.modeling.attention.ARCHITECTURES)."""

# bytes a token and block keep for backward: a for each of D, k for each of K, b for each of F, and
# (where attention is written out) s for each head and key
_SAVED: dict[str, dict[Mode, tuple[float, float, float, float]]] = {
    "gpt_neox": {
        **{"float32": (50.5, 0, 8, 0), "autocast": (16.5, 0, 4, 0), "half": (14.2, 0, 4, 0)},
    },
    # an activation that is written out keeps what a kernel of its own does not
    "phi": {"float32": (50.5, 0, 20, 0), "autocast": (16.5, 0, 11, 0), "half": (14.2, 0, 10, 0)},
    "llama": {
        **{"float32": (54.5, 0, 16, 0), "autocast": (28.6, 6.2, 8, 0), "half": (18.2, 6.2, 8, 0)},
    },
    "fused": {
        **{"float32": (46.5, 0, 16, 0), "autocast": (14.2, 6.2, 8, 0), "half": (10.0, 6.2, 8, 0)},
    },
    # queries and keys have norms of their own, of all heads
    "olmo2": {
        **{"float32": (77.0, 0, 16, 0), "autocast": (46.0, 6.2, 8, 0), "half": (35.5, 6.2, 8, 0)},
    },
    "gpt2": {"float32": (49.0, 0, 20, 0), "autocast": (20.5, 0, 10, 0), "half": (16.2, 0, 10, 0)},
    # ReLU keeps its result alone, which the next product keeps as well
    "opt": {"float32": (47.5, 0, 4, 0), "autocast": (24.5, 0, 2, 0), "half": (16.2, 0, 2, 0)},
    "gptj": {"float32": (24, 0, 20, 4), "autocast": (20, 0, 10, 6), "half": (12, 0, 10, 2)},
}
_LIKE = dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "phi3"), "llama")
"""Blocks of the same make."""
FUSED = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the models whose norms are one kernel (dpo.modeling.fused)."""
COMPARED = (
    *("gpt_neox", "gpt2", "llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "olmo2", "opt", "phi", "phi3"),
)
"""Kinds whose account was compared with a simulated step."""
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Elements of a tile of logits (dpo.modeling.head)."""
SMALLEST_TILE = 512
"""Tokens of the vocabulary."""
_CHUNK_TOKENS = 128
"""Smallest chunk of response tokens where the vocabulary is split over devices."""
_GPU_CONTEXT = 0.75 * 2**30
"""What the driver and its libraries keep, and NCCL's buffers; an allowance, not measured."""
_FRAGMENTATION = 0.04
"""Share of a GPU's memory that its allocator loses; an allowance, not measured."""


@dataclass(frozen=True)
class Job:
    """What decides the memory of a training."""

    shape: Architecture
    micro_batch_tokens: int
    """Tokens that go through the model at once on one device."""
    longest: int
    """Longest sequence, in tokens."""
    devices: int
    """Devices that share the weights; 1 for one process."""
    weights_dtype: str
    mode: Mode
    optimizer: str
    checkpointing: str
    several_micro_batches: bool
    """Gradients of earlier micro-batches are there while another one is in forward."""
    adapter_parameters: int | None = None
    """Trained weights of a LoRA adapter; None trains all weights."""
    on_gpu: bool = True
    split: int = 1
    """Devices over which each layer is split."""
    responses: float = 1.0
    """Share of a row's tokens that are responses', at most."""
    fused: bool = False
    """Norms are one kernel and keep one tensor (``model.kernels=auto`` on a GPU)."""

    @property
    def trained(self) -> int:
        """Weights that have gradients."""
        parameters = self.shape.parameters
        return parameters if self.adapter_parameters is None else self.adapter_parameters


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one device, in bytes, by what it is used for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reserve: float = 0.0
    """The driver's context and what the allocator loses; 0 on a CPU."""

    @property
    def total(self) -> float:
        """All of it."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits)
        return sum(parts) + self.reserve


def predict(job: Job) -> Memory:
    """The peak of a job: at one of the moments of a step, or in the optimiser's update."""
    moments = [_at_the_head(job), _in_a_block(job), _in_update(job)]
    if not job.several_micro_batches:
        moments.append(_in_the_last_block(job))
    return max(moments, key=lambda memory: memory.total)


def scoring(job: Job) -> float:
    """Bytes at the peak of a pass without gradients, of a row of ``micro_batch_tokens``."""
    weights, _, optimizer = _states(job)
    gathered, _, casts = _gathered(job)
    # what a block keeps for backward is what it has made
    activations = _tokens(job) * (_block(job) + _working(job))
    total = weights + gathered + casts + optimizer + activations + _logits(job)
    return total + reserve(total) if job.on_gpu else total


def _at_the_head(job: Job) -> Memory:
    """Between forward and backward: logits, and what all blocks have kept."""
    weights, gradients, optimizer = _states(job)
    gathered, _, casts = _gathered(job)
    if job.devices > job.split:
        # of the blocks the next one alone
        size = 2 if job.mode == "half" else BYTES[job.weights_dtype]
        gathered -= size * job.shape.block_parameters / job.split
    earlier = gradients if job.several_micro_batches else 0.0
    parts = (weights + gathered + casts, earlier, optimizer, _kept(job), _logits(job))
    return _with_reserve(job, Memory(*parts))


def _in_a_block(job: Job) -> Memory:
    """At the beginning of backward: the first block that is gone through."""
    weights, gradients, optimizer = _states(job)
    gathered, reduced, casts = _gathered(job)
    earlier = gradients if job.several_micro_batches else 0.0
    again = _block(job) if job.checkpointing != "none" else 0.0
    activations = _kept(job) + _tokens(job) * (again + _working(job))
    parts = (weights + gathered + casts, earlier + reduced, optimizer, activations)
    return _with_reserve(job, Memory(*parts, _output_gradient(job)))


def _in_the_last_block(job: Job) -> Memory:
    """At the end of backward, of a step of one row: all gradients, and the first block's."""
    weights, gradients, optimizer = _states(job)
    gathered, reduced, casts = _gathered(job)
    # one process keeps its casts of trained weights to the last row's end (dpo.modeling.precision)
    kept = casts if job.devices == 1 and job.adapter_parameters is None else 0.0
    parts = (weights + gathered + kept, gradients + reduced, optimizer, _at_the_end(job), 0.0)
    return _with_reserve(job, Memory(*parts))


def _in_update(job: Job) -> Memory:
    """Activations, casts and gathered weights are gone by then."""
    weights, gradients, optimizer = _states(job)
    return _with_reserve(job, Memory(weights, gradients, optimizer + _update(job), 0.0, 0.0))


def _with_reserve(job: Job, memory: Memory) -> Memory:
    return replace(memory, reserve=reserve(memory.total)) if job.on_gpu else memory


def reserve(used: float) -> float:
    """What a GPU needs beside ``used`` bytes of tensors."""
    return _GPU_CONTEXT + _FRAGMENTATION * used


def _states(job: Job) -> tuple[float, float, float]:
    """Weights, gradients and the optimiser's values, as far as this device holds them."""
    size, n = BYTES[job.weights_dtype], job.devices
    total = job.shape.parameters + (job.adapter_parameters or 0)
    values = {"RMSprop": 1, "AdamW": 2}[job.optimizer]
    trained = job.trained * size / n
    return total * size / n, trained, values * trained


def _gathered(job: Job) -> tuple[float, float, float]:
    """Gathered weights, gradients before and while they are reduced, and casts of weights."""
    shape, size = job.shape, BYTES[job.weights_dtype]
    weights = gradients = 0.0
    if job.devices > job.split:
        gathered = 2 if job.mode == "half" else size
        block, embedding = shape.block_parameters, shape.embedding_parameters
        weights = gathered * (2 * block + embedding) / job.split
        if job.adapter_parameters is None:
            # as it comes out of backward, and in float32 to be summed over devices
            gradients = (gathered + 4) * max(block, embedding) / job.split
    # of those that are multiplied in another type, until backward has passed them
    casts = 2.0 * shape.matrices / job.split if job.mode == "autocast" else 0.0
    return weights, gradients, casts


def _kept(job: Job) -> float:
    """Bytes that all blocks keep for backward."""
    shape = job.shape
    inputs = (2 if job.mode == "half" else 4) * shape.width
    share = {"none": 0.0, "selective": 0.5, "full": 1.0}[job.checkpointing]
    return _tokens(job) * shape.n_layers * ((1 - share) * _block(job) + share * inputs)


def _block(job: Job) -> float:
    """Bytes that a block keeps of a token."""
    shape = job.shape
    kind = "fused" if job.fused else _LIKE.get(shape.model_type, shape.model_type)
    a, k, b, s = _SAVED.get(kind, _SAVED["llama"])[job.mode]
    keys = k * shape.n_kv_heads * shape.head_size
    split = keys + b * shape.mlp_width + s * shape.n_heads * job.longest
    return a * shape.width + split / job.split


def _working(job: Job) -> float:
    """Bytes that backward works with in a block, of a token."""
    shape = job.shape
    wide = 2 if job.mode != "float32" else 4
    inner = 2 * shape.mlp_width * (1.5 if shape.gated else 1) / job.split
    return wide * (inner + 4 * shape.width)


def _at_the_end(job: Job) -> float:
    """What the last part of backward works with: the first block, or the embeddings."""
    shape = job.shape
    tables = 2 * 4.0 * shape.vocabulary * shape.width / job.split
    # tied ones have a gradient from the output layer; that of the input and the sum lie beside it
    tied = shape.embedding_parameters < 2 * shape.vocabulary * shape.width
    # FSDP's are counted while they are reduced
    whole = job.devices == job.split and job.adapter_parameters is None
    added = tables if tied and whole else 0.0
    return max(_tokens(job) * (_block(job) + _working(job)), added)


def _tokens(job: Job) -> float:
    """Tokens that go through the blocks at once."""
    tokens = max(job.micro_batch_tokens, job.longest)
    if job.shape.model_type in PACKED_TYPES:
        return tokens
    # each response with a prompt of its own, padded to the longest
    return 1.6 * tokens


def _logits(job: Job) -> float:
    shape = job.shape
    wide = 4 if job.mode == "float32" else 2
    if job.shape.model_type not in PACKED_TYPES:
        # of all tokens with their gradients; of the responses' in float32, and what softmax keeps
        responses = job.responses * max(job.micro_batch_tokens, job.longest)
        return (2 * wide * _tokens(job) + 8 * responses) * shape.vocabulary
    # a tile and the one before it in float32; beside them the new and the last one's 16-bit values
    chunk = (8 if job.mode == "float32" and job.split == 1 else 12) * _tile(job)
    copies = shape.vocabulary * shape.width / job.split * (2 if job.mode == "autocast" else 0)
    return chunk + copies + _output_gradient(job)


def _output_gradient(job: Job) -> float:
    """Of the output weights, until it is added to that of the embeddings or reduced."""
    if job.adapter_parameters is not None:
        return 0.0
    return 4.0 * job.shape.vocabulary * job.shape.width / job.split


def _tile(job: Job) -> float:
    """Logits that are in memory at once, in elements."""
    tokens, vocabulary = job.responses * _tokens(job), job.shape.vocabulary / job.split
    elements = LOGITS_AT_ONCE["cuda" if job.on_gpu else "cpu"]
    smallest = SMALLEST_TILE * tokens
    if job.split > 1:
        smallest = _CHUNK_TOKENS * vocabulary
        elements = elements if job.on_gpu else 0
    return min(max(elements, smallest), tokens * vocabulary)


def _update(job: Job) -> float:
    """What the optimiser works with: RMSprop takes roots of all its values at once on a GPU."""
    size = BYTES[job.weights_dtype]
    if job.optimizer == "AdamW":
        return 0.0
    if job.on_gpu:
        return job.trained * size / job.devices
    return job.shape.vocabulary * job.shape.width * size / job.devices
