"""Training beside TRL and beside a plain padded loop; see ``contenders`` and ``flops``.

For every case: pairs/s of optimiser steps, peak memory of the whole process, the largest difference
of the losses at any step, and this project's share of the machine's peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from dpo.storage.host_memory import VARIABLES
from tests.benchmarks.workload import Case

PEERS = ("trl", "plain")


def say(text: str) -> None:
    """What is being timed, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def in_own_process(module: str, name: str, case: Case) -> dict[str, Any]:
    """What a contender prints, run by itself with the case's threads.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    # ours as the local pipeline and the images start it
    own = VARIABLES if name == "ours" else {}
    environment = {
        **own,
        **os.environ,
        "OMP_NUM_THREADS": str(case.threads),
        "MKL_NUM_THREADS": str(case.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    say(f"{case.name}: {name} (steps: {case.warmup + case.steps})")
    done = subprocess.run(
        [sys.executable, "-m", module, name, case.as_json()],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name} {case.name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(
    benchmark: str, case: str, ours: float, peer: float, unit: str, **more: Any
) -> dict[str, Any]:
    """One result."""
    ratio = ours / peer if peer else None
    return {
        "benchmark": benchmark,
        "case": case,
        "ours": float(f"{ours:.4g}"),
        "peer": float(f"{peer:.4g}"),
        "ratio": None if ratio is None else round(ratio, 3),
        "unit": unit,
        **more,
    }


def measure(case: Case, peers: tuple[str, ...] = PEERS) -> list[dict[str, Any]]:
    """All results of one case."""
    module = "tests.benchmarks.contenders"
    ours = in_own_process(module, "ours", case)
    peak = in_own_process(module, "peak", case)["flops_per_second"]
    timed = sum(ours["seconds"][case.warmup :])
    found = [
        line(
            "training/share of peak",
            case.name,
            ours["flops"] / timed / 1e9,
            peak / 1e9,
            "model GFLOP/s of unique tokens",
            threads=case.threads,
        )
    ]
    for name in peers:
        peer = in_own_process(module, name, case)
        found += _against(name, case, ours, peer)
    return found


def _against(
    name: str, case: Case, ours: dict[str, Any], peer: dict[str, Any]
) -> list[dict[str, Any]]:
    pairs = zip(ours["losses"], peer["losses"], strict=True)
    apart = max(abs(own - other) for own, other in pairs)
    return [
        line(
            f"training/speed beside {name}",
            case.name,
            ours["pairs_per_second"],
            peer["pairs_per_second"],
            "pairs/s",
            steps=case.steps,
            settings=peer["settings"],
        ),
        line(
            f"training/memory beside {name}",
            case.name,
            ours["peak_mib"],
            peer["peak_mib"],
            "MiB peak",
        ),
        line(
            f"training/losses beside {name}",
            case.name,
            ours["losses"][-1],
            peer["losses"][-1],
            "loss at the last step",
            largest_difference=float(f"{apart:.3g}"),
            steps=len(ours["losses"]),
        ),
    ]
