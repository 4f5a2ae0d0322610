"""Peak memory of a step without a GPU and without weights: fake tensors and a fake process group.

The model, FSDP's sharding, forward and backward of two rows, clipping and the optimiser's update
are those of a real run; tensors have shapes and no contents. What is counted is every storage that
is alive, so a change of the code that keeps more shows by itself. One process is simulated of
``gpus``; operations are those of a CPU, whose fused attention keeps what a GPU's does.
"""

from __future__ import annotations

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dpo.config.losses import SFTLoss
from dpo.config.schema import RunConfig
from dpo.data.log_probs import PairLogProbs
from dpo.data.packing import pack
from dpo.data.tokenize import TokenizedExample
from dpo.modeling import attention, fused, head, plain, varlen
from dpo.modeling.lora import names_to_adapt
from dpo.modeling.precision import DTYPES, autocast
from dpo.modeling.recompute import checkpoint_activations
from dpo.modeling.sharded import Scorer, shard
from dpo.plan.architecture import config_values
from dpo.plan.job import FEW_TOKENS, has_fused_norms
from dpo.train.optimizer import build_optimizer
from dpo.train.parallel import Layout
from dpo.train.step import Objective

_LONGEST = 1024
"""Tokens of an example of a simulated row."""

_reports = logging.getLogger("torch._subclasses.fake_tensor")


class StorageCount(TorchDispatchMode):
    """Bytes of all storages made while it is active that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returns."""
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            # how many there are depends on contents; all of them at most
            result = args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        else:
            result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                self._add(value)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        weakref.finalize(storage, self._free, key)
        self._sizes[key] = 0
        self._grow(key, storage.nbytes())

    def _grow(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __enter__(self) -> StorageCount:
        original = self._resize

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._grow(storage._cdata, size)
            return result

        # FSDP frees gathered weights by giving their storage no bytes
        torch.UntypedStorage.resize_ = resize
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        torch.UntypedStorage.resize_ = self._resize


def peak_bytes(
    config: RunConfig,
    *,
    gpus: int,
    dtype: str,
    row: tuple[int, int, int],
    n_rows: int = 2,
    on_gpu: bool = False,
) -> int:
    """Peak of one process, in bytes; nothing is allocated.

    Args:
        config: Settings of a training stage.
        gpus: Processes that share the weights; 1 trains without FSDP.
        dtype: Type of the products.
        row: Tokens of prompt, chosen and rejected responses in a row, all examples together.
        n_rows: Rows of a step.
        on_gpu: The optimiser is to work as on a GPU, with all weights at once, and the output layer
            with as many logits.

    Raises:
        DpoError: the model is not known, or has no block of the given name.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        _processes(gpus),
        _replaced([_attention_of_a_gpu(), *(_parts_of_a_gpu() if on_gpu else ())]),
        _no_reports(),
        StorageCount() as count,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with fake, torch.device("meta" if gpus > 1 else "cpu"):
            model = _model(config)
        if on_gpu and has_fused_norms(config):
            fused.fuse(model)
        checkpoint_activations(model, config.activation_checkpointing, config.model.block_name)
        scorer = Scorer(model)
        if gpus > 1:
            # outside: the mesh of processes is made of real tensors
            mesh = Layout.of(config.trainer, "cpu").data
            assert mesh is not None
            with fake:
                scorer = shard(scorer, config.model, mesh, device="cpu")
        with fake:
            _steps(config, scorer, dtype, row, n_rows, on_gpu=on_gpu)
    return count.peak


def _steps(
    config: RunConfig,
    scorer: Scorer,
    dtype: str,
    row: tuple[int, int, int],
    n_rows: int,
    *,
    on_gpu: bool = False,
) -> None:
    """Two optimiser steps: the second has the optimiser's state."""
    model = scorer.model
    objective = Objective(
        model, config.loss, DTYPES[dtype], config.micro_batch_tokens or FEW_TOKENS, scorer=scorer
    )
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = build_optimizer(trained, config)
    if on_gpu and config.optimizer == "RMSprop":
        # torch's choice for tensors on a GPU; these say that they are on a CPU
        for group in optimizer.param_groups:
            group["foreach"] = True
    for _ in range(2):
        _backward(objective, row, n_rows)
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _model(config: RunConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config_values(config.model))
    kind = values.pop("model_type")

    def build(**options: Any) -> Any:
        # a configuration of its own: what failed with one stays in it
        settings = AutoConfig.for_model(kind, **values)
        dtype = DTYPES[config.model.policy_dtype]
        return AutoModelForCausalLM.from_config(settings, dtype=dtype, **options)

    try:
        model = build(attn_implementation="sdpa")
    except ValueError:
        # as where a model is loaded: Bloom, GPT-J and models without attention do not have it
        model = build()
    # whether padding changes values cannot be seen where there are none
    setattr(model, plain._PADS, True)
    return model.eval()


def check_adapter(config: RunConfig) -> None:
    """Refuse modules for a LoRA adapter that the model does not have, as training does.

    Raises:
        ConfigError: it has no linear layer of a given name.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        names_to_adapt(_model(config), config.lora)


def _backward(objective: Objective, row: tuple[int, int, int], n_rows: int) -> None:
    # sequences of a length that every model takes
    n_examples = -(-sum(row) // _LONGEST)
    lengths = (max(1, length // n_examples) for length in row)
    prompt, *responses = (np.ones(length, dtype=np.int32) for length in lengths)
    sft = isinstance(objective.loss, SFTLoss)
    example = TokenizedExample("0", prompt, tuple(responses[:1] if sft else responses))
    (batch,) = pack([example] * n_examples, n_examples * example.n_tokens)
    zeros = [np.zeros(len(part), dtype=np.float32) for part in responses]
    reference = None if sft else [PairLogProbs("", "", *zeros)] * n_examples
    with autocast(objective.dtype, "cpu"):
        for _ in range(n_rows):
            losses_E, _ = objective.figures(batch, reference, "train")
            losses_E.sum().backward()


class _Norm(torch.autograd.Function):
    """Keeps what a GPU's kernel keeps; there are no values."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_D: Tensor, _: float) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, weight_D.dtype)
        hidden = hidden.to(dtype)
        ctx.save_for_backward(hidden, weight_D, hidden[..., :1].float())
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight_D, *_ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight_D), None


class _Varlen(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(ctx: Any, query_THD: Tensor, key_KGD: Tensor, value_KGD: Tensor) -> Tensor:
        out_THD = torch.empty_like(query_THD)
        ctx.save_for_backward(query_THD, key_KGD, value_KGD, out_THD, query_THD[..., 0].float())
        return out_THD

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


Change = tuple[dict[str, Any], dict[str, Any]]
"""Names of a module, or keys, and their values for a while."""


def _attention_of_a_gpu() -> Change:
    """Fused attention for every length: what a CPU does for short ones keeps other tensors."""
    return vars(attention), {"LONGEST": 0}


def _parts_of_a_gpu() -> list[Change]:
    """Norms and rotations that a CPU works on in blocks, variable-length attention, more logits."""
    return [
        (vars(fused), {"in_blocks": lambda _: False, "_norm_by_torch": _Norm.apply}),
        (vars(attention), {"takes_varlen": lambda value: value.element_size() == 2}),
        (vars(varlen), {"varlen_kernel": lambda: lambda q, k, v, *_, **__: _Varlen.apply(q, k, v)}),
        (head.TILE_ELEMENTS, {"cpu": head.TILE_ELEMENTS["cuda"]}),
    ]


@contextmanager
def _replaced(changes: Sequence[Change]) -> Iterator[None]:
    before = [(names, {name: names[name] for name in values}) for names, values in changes]
    try:
        for names, values in changes:
            names.update(values)
        yield
    finally:
        for names, values in before:
            names.update(values)


@contextmanager
def _no_reports() -> Iterator[None]:
    """None of torch's own reports, with a traceback, of an operation that fake tensors refuse."""
    before, _reports.disabled = _reports.disabled, True
    try:
        yield
    finally:
        _reports.disabled = before


@contextmanager
def _processes(n: int) -> Iterator[None]:
    """A process group that sends nothing."""
    if n == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = os.environ.get("LOCAL_RANK")
    # one of those that are handed their weights
    dist.init_process_group("fake", rank=1, world_size=n, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        if before is None:
            os.environ.pop("LOCAL_RANK", None)
