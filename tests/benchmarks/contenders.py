"""Who takes part in the training benchmark; each is run in a process of its own.

    python -m tests.benchmarks.contenders ours '{"model": "gpt_neox_17m", ...}'

prints one JSON object: seconds of every timed optimiser step, the losses of all steps, peak memory
and settings. ``ours`` is ``Trainer.train_step``, metric log included. ``trl`` is TRL's DPOTrainer
with precomputed reference log-probabilities, from the start of a step to its end; its fastest
settings for a CPU (no activation checkpointing, fused AdamW, fused output layer as it has it by
default). ``plain`` is the loop of the DPO reference code: chosen and rejected padded to the longest
of the batch, logits of every position. ``peak`` measures the machine.

On a GPU (``device``) a step ends when the GPU has done it, and peak memory is what torch counted of
tensors there.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dpo.data.loader import Order
from dpo.data.log_probs import PairLogProbs
from dpo.data.tokenize import TokenizedExample
from dpo.distributed.device import best_device
from dpo.modeling.budget import token_budget
from dpo.modeling.lanes import lanes_for
from dpo.modeling.precision import autocast
from dpo.modeling.scoring import score
from dpo.train.data import Examples
from dpo.train.log import MetricLog
from dpo.train.step import Objective
from dpo.train.trainer import Trainer
from tests.benchmarks.flops import peak_flops_per_second, step_flops
from tests.benchmarks.workload import (
    BETA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Case,
    config_of,
    load,
    pairs,
    tokenizer_of,
)

Result = dict[str, Any]


def batches(case: Case) -> list[list[TokenizedExample]]:
    """The examples of every step, warm-up first."""
    found = pairs(case.model, (case.warmup + case.steps) * case.batch, case.seed)
    return [found[first : first + case.batch] for first in range(0, len(found), case.batch)]


def make_trainer(
    case: Case,
    folder: Path,
    steps: list[list[TokenizedExample]],
    reference: dict[str, PairLogProbs] | None = None,
) -> Trainer:
    """Our trainer; the reference of every pair is computed where it is not given."""
    config, dtype = config_of(case), getattr(torch, case.dtype)
    model = load(case, config.model)
    budget = token_budget(config, model, case.device)
    known = reference or {}
    for examples in [] if reference else steps:
        scored = score(model, examples, dtype=dtype, token_budget=budget)
        for example, row in zip(examples, scored, strict=True):
            known[example.pair_id] = PairLogProbs("", "", *row)
    every = [example for examples in steps for example in examples]
    order = Order(len(every), case.batch, n_epochs=1, n_examples=None, seed=0)
    data = Examples(order, dict(enumerate(every)), [], "benchmark")
    objective = Objective(model, config.loss, dtype, budget, lanes=lanes_for(model))
    return Trainer(config, "preference", objective, data, known, MetricLog(folder))


def run_ours(case: Case) -> Result:
    """This project."""
    steps = batches(case)
    seconds, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, Path(folder), steps)
        for examples in steps:
            start = now(case)
            figures = trainer.train_step(examples)
            seconds.append(now(case) - start)
            losses.append(figures["loss/train"])
        trainer.log.close()
    settings = {"micro_batch_tokens": trainer.objective.token_budget, "further": case.settings}
    flops = [step_flops(trainer.objective.model, examples) for examples in steps]
    return {**_result(case, seconds, losses, settings), "flops": sum(flops[case.warmup :])}


def run_plain(case: Case) -> Result:
    """A padded loop without any of it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    steps = batches(case)
    model = load(case)
    dtype = getattr(torch, case.dtype)
    parts = [
        [examples[first : first + case.at_once] for first in range(0, case.batch, case.at_once)]
        for examples in steps
    ]
    with torch.no_grad(), autocast(dtype, case.device):
        reference = [[_padded_sums(model, part) for part in step] for step in parts]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    seconds, losses = [], []
    for step, known in zip(parts, reference, strict=True):
        start = now(case)
        found = []
        for part, reference_S in zip(step, known, strict=True):
            with autocast(dtype, case.device):
                ratio_S = _padded_sums(model, part) - reference_S
            chosen_B, rejected_B = ratio_S.chunk(2)
            loss = -F.logsigmoid(BETA * (chosen_B - rejected_B)).sum() / case.batch
            loss.backward()
            found.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(torch.stack(found).sum()))
        seconds.append(now(case) - start)
    settings = {"padding": "longest", "logits": "all", "pairs at once": case.at_once}
    return _result(case, seconds, losses, settings)


def _padded_sums(model: Any, examples: list[TokenizedExample]) -> torch.Tensor:
    """Summed log-probability of all chosen, then all rejected responses."""
    rows = [np.concatenate([e.prompt_T, e.responses[side]]) for side in (0, 1) for e in examples]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, wanted = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.as_tensor(row)
        mask[number, : len(row)] = 1
        wanted[number, len(examples[number % len(examples)].prompt_T) : len(row)] = 1
    ids, mask, wanted = (tensor.to(model.device) for tensor in (ids, mask, wanted))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (log_probs * wanted[:, 1:]).sum(1)


def run_trl(case: Case) -> Result:
    """TRL's DPOTrainer."""
    os.environ["TQDM_DISABLE"] = "1"
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    disable_caching()
    disable_progress_bars()
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times optimiser steps."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = now(case)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now(case) - self.start)

    class Peer(DPOTrainer):  # type: ignore[misc]
        """Takes our token ids as they are, and keeps its losses in full."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    rows = [
        {
            "prompt_ids": example.prompt_T.tolist(),
            "chosen_ids": example.responses[0].tolist(),
            "rejected_ids": example.responses[1].tolist(),
        }
        for examples in batches(case)
        for example in examples
    ]
    settings = {
        "loss_type": "sigmoid",
        "beta": BETA,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "per_device_train_batch_size": case.at_once,
        "gradient_accumulation_steps": case.batch // case.at_once,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": case.at_once,
        "gradient_checkpointing": False,
        "bf16": case.dtype == "bfloat16",
        "max_length": None,
        "train_sampling_strategy": "sequential",  # the pairs come in random order
        "num_train_epochs": 1,
        "logging_steps": 1,
    }
    tokenizer = tokenizer_of(case.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            use_cpu=case.device == "cpu",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        trainer = Peer(
            model=load(case),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        with _quiet():
            trainer.train()
    means = np.reshape(losses, (len(seconds), -1)).mean(1).tolist()
    return _result(case, seconds, means, settings)


class _quiet:
    """TRL prints each log line to standard output, where the result goes."""

    def __enter__(self) -> None:
        self._before, sys.stdout = sys.stdout, sys.stderr

    def __exit__(self, *_: object) -> None:
        sys.stdout = self._before


def run_peak(case: Case) -> Result:
    """The fastest products of this machine."""
    speed = peak_flops_per_second(load(case), getattr(torch, case.dtype))
    return {"flops_per_second": speed}


def now(case: Case) -> float:
    """Seconds, when all that was asked of the device is done."""
    if case.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes(case: Case) -> int:
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _result(case: Case, seconds: list[float], losses: list[float], settings: Result) -> Result:
    timed = seconds[case.warmup :]
    return {
        "pairs_per_second": case.batch * len(timed) / sum(timed),
        "seconds": [round(value, 3) for value in seconds],
        "losses": losses,
        "peak_mib": _peak_bytes(case) / 2**20,
        "settings": settings,
    }


CONTENDERS: dict[str, Callable[[Case], Result]] = {
    "ours": run_ours,
    "trl": run_trl,
    "plain": run_plain,
    "peak": run_peak,
}


def main(words: list[str]) -> None:
    """Run one contender and print its result."""
    warnings.simplefilter("ignore")
    name, text = words
    case = Case(**json.loads(text))
    torch.set_num_threads(case.threads)
    if case.device == "cuda":
        best_device()
    print(json.dumps(CONTENDERS[name](case)))


if __name__ == "__main__":
    main(sys.argv[1:])
