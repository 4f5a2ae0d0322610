"""The benchmarks; each ends with one JSON object a line on standard output.

    make bench                                     all of training in about 20 minutes
    make bench ARGS="--full"                       50 steps a case, about three hours
    make bench ARGS="training --model smollm2 --dtype bfloat16 --steps 5"
    make bench ARGS="training --device cuda --batch 64 --tokens 16384 --steps 12 --warmup 4"
    make bench ARGS="training --set model.compile=true --peer none"
    make bench ARGS="rerun overhead"
    make bench ARGS="ingest --gigabytes 2"         see tests/benchmarks/ingest.py
    make bench ARGS="tokenisation"                 beside datasets.map

Run it on a machine that does nothing else: contenders run one after the other. SmolLM2 in TRL needs
16 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from dpo.modeling.precision import has_fast_bfloat16
from tests.benchmarks.training import PEERS, in_own_process, line, measure, say
from tests.benchmarks.workload import DTYPES, GPU_MODELS, MODELS, Case

_SHORT_STEPS = {"gpt_neox_17m": 6, "smollm2": 2, "llama_1b": 2}
_FULL_STEPS = 50
_EXTRA_STEPS = {"rerun": (8, 24), "overhead": (100, 100)}
"""Steps of a short and of a full run."""


def options_of(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="training, rerun, overhead; all when left out")
    parser.add_argument(
        "--model", action="append", choices=list(dict.fromkeys((*MODELS, *GPU_MODELS)))
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--peer", action="append", choices=[*PEERS, "none"])
    parser.add_argument("--steps", type=int, help="timed optimiser steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--batch", type=int, default=8, help="pairs of an optimiser step")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=0, help="ours: micro_batch_tokens")
    parser.add_argument("--peer-batch", type=int, default=0, help="the peers: pairs at once")
    parser.add_argument("--set", action="append", default=[], help="ours: a further setting")
    parser.add_argument("--full", action="store_true", help=f"{_FULL_STEPS} steps a case")
    options = parser.parse_args(words)
    known = {"training", "rerun", "overhead"}
    if wrong := set(options.names) - known:
        parser.error(f"no benchmark {', '.join(sorted(wrong))}: choose of {', '.join(known)}")
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Every case of the training benchmark."""
    for model in options.model or (MODELS if options.device == "cpu" else GPU_MODELS):
        for dtype in options.dtype or _usual_dtypes(options.device):
            short = _FULL_STEPS if options.full else _SHORT_STEPS[model]
            yield _case(options, model, dtype, options.steps or short)


def _usual_dtypes(device: str) -> tuple[str, ...]:
    """Types of products that are worth timing on this machine, where none is named."""
    if device != "cpu" or has_fast_bfloat16("cpu"):
        return DTYPES
    say("bfloat16 is left out: this processor has no instructions for it (--dtype bfloat16)")
    return ("float32",)


def _case(options: argparse.Namespace, model: str, dtype: str, steps: int) -> Case:
    return Case(
        model,
        dtype,
        steps,
        warmup=options.warmup,
        batch=options.batch,
        threads=options.threads,
        token_budget=options.tokens,
        peer_batch=options.peer_batch,
        device=options.device,
        settings=tuple(options.set),
    )


def extras(options: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """Results of ``rerun`` or ``overhead``: of the small model unless others are named."""
    steps = options.steps or _EXTRA_STEPS[name][options.full]
    for model in options.model or MODELS[:1]:
        for dtype in options.dtype or DTYPES[:1]:
            case = _case(options, model, dtype, steps)
            found = in_own_process("tests.benchmarks.extras", name, case)
            ours, peer = found.pop("ours"), found.pop("peer")
            rest = {key: round(value, 2) for key, value in found.items()}
            yield line(f"training/{name}", case.name, ours, peer, "s", steps=steps, **rest)


def main() -> None:
    """Run what was asked for."""
    words = sys.argv[1:]
    if words[:1] in (["ingest"], ["tokenisation"]):
        from importlib import import_module

        sys.argv = words
        import_module(f"tests.benchmarks.{words[0]}").main()
        return
    options = options_of(words)
    peers = tuple(peer for peer in options.peer or PEERS if peer != "none")
    for name in options.names or ("training", "rerun", "overhead"):
        if name == "training":
            for case in cases(options):
                for result in measure(case, peers):
                    print(json.dumps(result), flush=True)
        else:
            for result in extras(options, name):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
