"""``make accept-gpu``: what only the owner of a GPU can measure, in one command and one table.

    correctness   the tests marked ``gpu``
    utilisation   TFLOP/s of training (dpo.plan.compute) over the GPU's peak
    memory        the largest peak that torch counted, beside what ``dpo plan`` predicts
    kill, resume  a training killed with SIGKILL goes on to the same weights, bit for bit

``--dry-run`` does the same on a CPU with the tiny model, without the tests, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_TIMEOUT_SECONDS = 1800
_FILLS_A_GPU = 1e9
"""Parameters of a model whose products keep a GPU busy; below, launches and norms take the time."""
_NO_GPU = "no GPU was found: torch.cuda.is_available() is false (--dry-run tries this on a CPU)"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    check: str
    passed: bool
    measured: str
    expected: str


@dataclass(frozen=True)
class Trial:
    """Settings of the trainings that are measured."""

    words: tuple[str, ...]
    gpu: str
    peak_tflops: float | None
    dry: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check; 0 when all pass, 1 when one fails, 2 without a GPU."""
    options = _options().parse_args(arguments)
    import torch

    if not torch.cuda.is_available() and not options.dry_run:
        print(_NO_GPU, file=sys.stderr)
        return 2
    trial = _trial(options)
    rows: list[Row] = [] if options.dry_run else [_correctness()]
    with TemporaryDirectory() as folder:
        data = Path(folder, "data")
        _dpo("ingest", *trial.words, f"output={data}")
        for check in (_speed_and_memory, _kill_and_resume):
            rows += check(trial, data, Path(folder))
    _print(rows, trial)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"gpu": trial.gpu, "settings": trial.words, "rows": [asdict(row) for row in rows]}
    options.output.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\nsend back: {options.output}")
    return 0 if all(row.passed for row in rows) else 1


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make accept-gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with the tiny model")
    parser.add_argument("--model", default="smollm2", help="a choice of config/model")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's 16-bit peak, if not known")
    parser.add_argument("--output", type=Path, default=Path("build/accept-gpu.json"))
    parser.add_argument("settings", nargs="*", help="further key=value settings")
    return parser


def _trial(options: argparse.Namespace) -> Trial:
    import torch

    from dpo.plan.compute import PEAK_TFLOPS

    if options.dry_run:
        words = ("model=tiny", "max_length=96", "max_prompt_length=48", "batch_size=8")
        words += ("n_examples=64", "micro_batch_tokens=512", *options.settings)
        return Trial((*words, "n_eval_examples=8", "lr=1e-3"), "CPU (dry run)", 1.0, True)
    name = torch.cuda.get_device_name()
    peak = options.peak_tflops or next(
        (tflops for known, tflops in PEAK_TFLOPS.items() if known in name.replace(" ", "")), None
    )
    words = (f"model={options.model}", "batch_size=64", "micro_batch_tokens=16384", "lr=1e-5")
    words += ("n_examples=1280", "n_eval_examples=64", *options.settings)
    return Trial(words, name, peak, False)


def _correctness() -> Row:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    # 5: no test was collected, which proves nothing
    return Row("correctness (pytest -m gpu)", done.returncode == 0, last, "all pass")


def _speed_and_memory(trial: Trial, data: Path, folder: Path) -> list[Row]:
    out = folder / "whole"
    peak = _train(trial, data, out)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if "examples_per_second" in line]
    # the first steps warm caches up
    pace = statistics.median(line["examples_per_second"] for line in steps[len(steps) // 4 :])
    plan = _plan(trial, data)
    tflops = pace * plan["tflop_a_pair"]
    rows = []
    if trial.peak_tflops is None:
        rows.append(Row("utilisation", False, f"{tflops:.1f} TFLOP/s", "give --peak-tflops"))
    else:
        share = tflops / trial.peak_tflops
        text = f"{share:.1%} ({tflops:.3g} TFLOP/s, {pace:.1f} pairs/s)"
        small = plan["parameters"] < _FILLS_A_GPU
        wanted = f"at least {plan['utilisation']:.0%}"
        if trial.dry or small:
            wanted = "any (dry run)" if trial.dry else "any: so small a model does not fill a GPU"
        passed = trial.dry or small or share >= plan["utilisation"]
        rows.append(Row("utilisation", passed, text, wanted))
    predicted = plan["memory_gib"]["total"] - plan["memory_gib"]["reserve"]
    found = peak / 2**30
    near = trial.dry or abs(found / predicted - 1) < 0.2
    # of a GPU the tensors are counted, of a dry run the whole process
    within = "any (dry run)" if trial.dry else "20 %"
    rows.append(
        Row("peak memory", near, f"{found:.2f} GiB", f"{predicted:.2f} GiB by dpo plan, {within}")
    )
    return rows


def _plan(trial: Trial, data: Path) -> dict[str, Any]:
    shown = _dpo(
        "plan",
        *trial.words,
        *("--output", "json", f"data={data}", "loss=dpo", f"gpus={0 if trial.dry else 1}"),
        *("gpu_memory_gib=100000", f"peak_tflops={trial.peak_tflops or 1}"),
    )
    found: dict[str, Any] = json.loads(shown)
    return found


_CHILD = """
import resource, sys, torch
from dpo.cli import main
code = main(sys.argv[1:])
cuda = torch.cuda.is_available()
peak = torch.cuda.max_memory_allocated() if cuda else \
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("peak", peak)
sys.exit(code)
"""


def _train(trial: Trial, data: Path, out: Path) -> int:
    """Train without interruption; the peak of its memory, in bytes."""
    words = ("train", "loss=dpo", *trial.words, f"data={data}", f"output={out}")
    return int(_run([sys.executable, "-c", _CHILD, *words]).split()[-1])


def _kill_and_resume(trial: Trial, data: Path, folder: Path) -> list[Row]:
    place = folder / "resumed"
    out = place / "model"
    every = "checkpoint_every=16" if trial.dry else "checkpoint_every=256"
    words = ["train", "loss=dpo", *trial.words, f"data={data}", f"output={out}", every]
    command = [sys.executable, "-m", "dpo", *words, "checkpoint_seconds=0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = _kill_when(process, lambda: any(place.glob("checkpoints/*/step-*")))
    errors = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    names = sorted(path.name for path in (folder / "whole").glob("*.safetensors"))
    same = bool(names) and all(
        (out / name).is_file()
        and (out / name).read_bytes() == (folder / "whole" / name).read_bytes()
        for name in names
    )
    resumed = "goes on after step" in errors
    text = f"killed: {killed}, resumed: {resumed}, same weights: {same}"
    return [Row("kill and resume", killed and resumed and same, text, "the same bits")]


def _kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    """SIGKILL as soon as ``ready``; whether that was before its end."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if ready():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    return process.wait() == -signal.SIGKILL


def _dpo(*words: str) -> str:
    return _run([sys.executable, "-m", "dpo", *words])


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"{' '.join(command[1:4])} ended with {done.returncode}")
    return done.stdout


def _print(rows: Sequence[Row], trial: Trial) -> None:
    print(f"GPU: {trial.gpu}\nsettings: {' '.join(trial.words)}\n")
    cells = [("check", "", "measured", "expected")]
    cells += [(r.check, "passed" if r.passed else "FAILED", r.measured, r.expected) for r in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    for row in cells:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


def _show_one_gpu(arguments: Sequence[str]) -> None:
    """A BasicTrainer takes all that it sees, and the table is about one, or none."""
    seen = "" if "--dry-run" in arguments else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]


if __name__ == "__main__":
    _show_one_gpu(sys.argv[1:])
    sys.exit(main())
