"""What a second beta costs, and what logging and checkpoints cost.

    python -m tests.benchmarks.extras rerun '{"model": "gpt_neox_17m", ...}'

``rerun``: the seconds of a second preference run with another beta (one epoch, no evaluation), as a
share of the first one's with the reference pass. ``overhead``: the seconds of ``Trainer.run`` with
metric log, a checkpoint every 50 steps and evaluations (less the evaluations' own forward passes),
beside the same steps and nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo.data.log_probs import PairLogProbs
from dpo.data.tokenize import TokenizedExample
from dpo.modeling.budget import token_budget
from dpo.modeling.scoring import score
from dpo.train.checkpoint import Checkpoints
from dpo.train.place import Place
from dpo.train.trainer import Trainer
from tests.benchmarks.contenders import batches, make_trainer
from tests.benchmarks.workload import Case, config_of, load, pairs

CHECKPOINT_STEPS = 50
N_EVALUATION_PAIRS = 8


def run_rerun(case: Case) -> dict[str, Any]:
    """Reference pass and an epoch, then an epoch with another beta."""
    steps = batches(case)
    every = [example for examples in steps for example in examples]
    config = config_of(case)
    model = load(case, config.model)
    budget, dtype = token_budget(config, model, case.device), getattr(torch, case.dtype)
    start = time.perf_counter()
    scored = score(model, every, dtype=dtype, token_budget=budget)
    reference_seconds = time.perf_counter() - start
    del model
    reference = {
        example.pair_id: PairLogProbs("", "", *row)
        for example, row in zip(every, scored, strict=True)
    }
    seconds = []
    for beta in (0.1, 0.3):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(case, Path(folder), steps, reference)
            trainer.objective.loss = trainer.objective.loss.model_copy(update={"beta": beta})
            seconds.append(_epoch(trainer, steps))
            trainer.log.close()
    first, second = seconds
    return {"ours": second, "peer": first + reference_seconds, "reference": reference_seconds}


def _epoch(trainer: Trainer, steps: list[list[TokenizedExample]]) -> float:
    start = time.perf_counter()
    for examples in steps:
        trainer.train_step(examples)
    return time.perf_counter() - start


def run_overhead(case: Case) -> dict[str, Any]:
    """Everything a run writes, beside nothing."""
    steps = batches(case)
    with tempfile.TemporaryDirectory() as name:
        bare = make_trainer(case, Path(name), steps)
        bare.log.write = lambda values: None  # type: ignore[method-assign]
        reference = bare.reference
        assert reference is not None
        bare_seconds = _epoch(bare, steps)
        del bare
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(case, folder, steps)
        trainer.config = trainer.config.model_copy(
            update={
                "checkpoint_every": CHECKPOINT_STEPS * case.batch,
                "checkpoint_seconds": 0,
                "eval_every": CHECKPOINT_STEPS * case.batch,
            }
        )
        held_out = pairs(case.model, N_EVALUATION_PAIRS, case.seed)
        trainer.examples = replace(trainer.examples, held_out=held_out)
        keeper = Checkpoints(Place(folder / "checkpoints"), {"case": case.name}, 2, "never")
        keeper.find()
        trainer.checkpoints = keeper
        evaluations = _timed(trainer)
        start = time.perf_counter()
        trainer.run()
        whole_seconds = time.perf_counter() - start - sum(evaluations)
        trainer.log.close()
    return {"ours": whole_seconds, "peer": bare_seconds, "evaluations": sum(evaluations)}


def _timed(trainer: Trainer) -> list[float]:
    """Seconds of every forward pass over the held-out pairs, filled while it runs."""
    evaluate, seconds = trainer.objective.evaluate, list[float]()

    def timed(*args: Any) -> dict[str, float]:
        start = time.perf_counter()
        found = evaluate(*args)
        seconds.append(time.perf_counter() - start)
        return found

    trainer.objective.evaluate = timed  # type: ignore[method-assign]
    return seconds


EXTRAS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "rerun": run_rerun,
    "overhead": run_overhead,
}


def main(words: list[str]) -> None:
    """Run one measurement and print its result."""
    warnings.simplefilter("ignore")
    name, text = words
    case = Case(**json.loads(text))
    torch.set_num_threads(case.threads)
    print(json.dumps(EXTRAS[name](case)))


if __name__ == "__main__":
    main(sys.argv[1:])
