"""``dpo compare``: the figures of several runs side by side, as one page and as Markdown.

Runs that were measured on the same held-out pairs are compared pair by pair with the first one
named; others only side by side, and the page says so. Imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from dpo.errors import ConfigError, EvaluationError, ObjectMissing, writing
from dpo.evaluate import charts
from dpo.evaluate.bootstrap import Bootstrap
from dpo.evaluate.compared_samples import shared_samples
from dpo.evaluate.escaped import cell, fenced
from dpo.evaluate.numbers import finite, interval_text
from dpo.evaluate.ranking import ranks
from dpo.evaluate.report import environment
from dpo.evaluate.samples import CHANGES
from dpo.storage.store import expect_bucket, is_store_url, open_store

_FILES = ("evaluation.json", "pairs.json", "samples.json")
_USAGE = (
    "dpo compare RUN RUN..., each the output of evaluate, a run's folder or "
    "s3://bucket/prefix/runs/ID"
)
_N_BOOTSTRAP = 1000
_MAX_RUNS = 100
_MARKDOWN_SAMPLES = 20
COLUMNS = (
    ("Reward accuracy", ("after", "reward_accuracy")),
    ("Reward margin", ("after", "reward_margin")),
    ("Area under ROC", ("calibration", "auc")),
    ("KL, nats an answer", ("kl", "per_answer")),
    ("Length growth", ("answers", "length_growth")),
    ("Repetition", ("answers", "policy", "repetition")),
    ("Perplexity growth", ("change", "perplexity_growth")),
    ("Chosen log-prob change", ("change", "chosen_logp")),
)
"""Title and place of each figure of the table."""


@dataclass(eq=False)
class Run:
    """One evaluated run."""

    where: str
    """What was named on the command line, or the folder below it."""
    evaluation: dict[str, Any]
    pairs: dict[str, Any] | None
    """Figures of each pair; None where the run did not keep them."""
    samples: list[dict[str, Any]] | None = None
    """Its answers; None where the run did not keep them."""
    label: str = ""
    difference: Mapping[str, float] | None = field(default=None)
    """Reward accuracy minus that of the first run, on the same pairs."""

    def figure(self, *keys: str) -> Mapping[str, float] | None:
        """A figure with its interval, or None where one of its numbers is missing."""
        parts = {name: finite(self.evaluation, *keys, name) for name in ("value", "low", "high")}
        numbers = {name: part for name, part in parts.items() if part is not None}
        return numbers if len(numbers) == len(parts) else None


def compare(names: Sequence[str], output: Path) -> list[Run]:
    """Write ``compare.html`` and ``compare.md`` into ``output``; the runs, best first by accuracy.

    Args:
        names: Evaluation folders, folders with evaluations below them, or ``runs/<id>`` in a store.
        output: Folder to write to; made where it is missing.

    Raises:
        EvaluationError: a name holds no evaluation, or fewer than two were found.
    """
    runs = [run for name in names for run in read_runs(name)]
    if len(runs) < 2:
        raise EvaluationError(
            f"{'one' if runs else 'no'} evaluated run was found; a comparison needs two or more",
            where=", ".join(names),
            fix=_USAGE,
        )
    if len(runs) > _MAX_RUNS:
        raise EvaluationError(
            f"{len(runs)} evaluated runs were found; at most {_MAX_RUNS} fit one page",
            where=", ".join(names),
        )
    _label(runs)
    for run in runs[1:]:
        run.difference = _difference(runs[0], run)
    pairs = {run.evaluation.get("held_out") for run in runs}
    # an earlier version's figures do not say on which they were measured
    same = len(pairs) == 1 and None not in pairs
    output.mkdir(parents=True, exist_ok=True)
    samples, n_left_out = shared_samples([run.samples for run in runs])
    html = _page(runs, same, samples, n_left_out)
    text = _markdown(runs, same, samples)
    with writing(output):
        (output / "compare.html").write_text(html, encoding="utf-8", errors="replace")
        (output / "compare.md").write_text(text, encoding="utf-8", errors="replace")
    return ranked(runs)


def _page(
    runs: Sequence[Run], same: bool, samples: Sequence[dict[str, Any]], n_left_out: int
) -> str:
    template = environment().get_template("compare.html.j2")
    title, chart = _chart(runs)
    return template.render(
        runs=runs,
        columns=COLUMNS,
        same_pairs=same,
        best=ranked(runs)[0],
        chart_title=title,
        # labels are escaped by the chart
        chart=Markup(chart),
        samples=samples,
        n_left_out=n_left_out,
        sources=sorted({sample["dataset"] for sample in samples}),
        changes=CHANGES,
    )


def ranked(runs: Sequence[Run]) -> list[Run]:
    """The best first, by the order of a sweep."""
    places = ranks([run.evaluation for run in runs])
    return [runs[n] for n in sorted(range(len(runs)), key=places.__getitem__, reverse=True)]


def read_runs(name: str) -> list[Run]:
    """The evaluations at or below a folder, or at a store's URL.

    Raises:
        EvaluationError: there is none, or one that cannot be read.
    """
    if is_store_url(name):
        return [_from_store(name)]
    folder = Path(name).expanduser()
    if (folder / _FILES[0]).is_file():
        return [_from_folder(folder)]
    # a step's output has a manifest beside it; a copy that is being written has none
    found = sorted(path.parent for path in folder.rglob(_FILES[0]))
    complete = [path for path in found if (path / "manifest.json").is_file()]
    if not complete:
        raise _no_evaluation(name)
    # a local run's folder holds each twice: the step's output and the store's copy, by run id
    once = {(path / _FILES[0]).read_bytes(): path for path in complete}
    return [_from_folder(path) for path in sorted(once.values())]


def _no_evaluation(name: str) -> EvaluationError:
    return EvaluationError(
        "there is no evaluation here",
        where=name,
        fix="name the output of evaluate, a folder above it, or a run's folder in a store "
        "(s3://bucket/prefix/runs/ID)",
    )


def _from_folder(folder: Path) -> Run:
    texts = [(folder / name).read_bytes() if (folder / name).is_file() else None for name in _FILES]
    return _parsed(str(folder), *texts)


def _from_store(url: str) -> Run:
    store = open_store(url)
    texts: list[bytes | None] = []
    for name in _FILES:
        try:
            texts.append(store.read(name))
        except ObjectMissing:
            texts.append(None)
    if texts[0] is None:
        expect_bucket(store, _FILES[0])
    return _parsed(url, *texts)


def _parsed(
    where: str, evaluation: bytes | None, pairs: bytes | None, samples: bytes | None
) -> Run:
    if evaluation is None:
        raise _no_evaluation(where)
    try:
        values = json.loads(evaluation)
        for part in ("value", "low", "high"):
            if finite(values["after"], "reward_accuracy", part) is None:
                raise ValueError(f"after.reward_accuracy.{part} is no number")
        answers = json.loads(samples) if samples else None
        for sample in answers or ():
            _ = [sample[key] for key in ("prompt", "dataset", "chosen", "sft", "policy")]
            _ = float(sample.get("reward_change") or 0.0)
        return Run(where, values, json.loads(pairs) if pairs else None, answers)
    except (ValueError, KeyError, TypeError) as error:
        # not of a UnicodeDecodeError: that holds the whole file
        found = f"{type(error).__name__}: {error}"
        raise EvaluationError(
            f"the evaluation cannot be read: {found}", where=where, fix="run evaluate again"
        ) from None


def _label(runs: Sequence[Run]) -> None:
    """Name each run by its loss, by what differs, and by its folder where that is not enough."""
    for run in runs:
        run.label = _loss_label(run.evaluation.get("loss") or {})
    for run in _repeated(runs):
        run.label = f"{run.label} ({_short(run.where)})"
    for run in _repeated(runs):
        run.label = f"{run.label} #{runs.index(run) + 1}"


def _loss_label(loss: Mapping[str, Any]) -> str:
    """A loss by its name, its strength, and each option that makes it another one."""
    shown = [str(loss.get("name", "run"))]
    shown += [f"β {loss['beta']}"] if "beta" in loss else []
    options = (("label_smoothing", "smoothing"), ("gamma", "γ"), ("sft_weight", "SFT term"))
    shown += [f"{name} {loss[key]}" for key, name in options if loss.get(key)]
    shown += ["reference-free"] if loss.get("reference_free") else []
    shown += ["per token"] if loss.get("log_probs") == "mean" else []
    return " ".join(shown)


def _repeated(runs: Sequence[Run]) -> list[Run]:
    """The runs whose label another run has too."""
    counts = Counter(run.label for run in runs)
    return [run for run in runs if counts[run.label] > 1]


def _short(where: str) -> str:
    parts = [part for part in where.rstrip("/").split("/") if part not in ("evaluation", "")]
    return "/".join(parts[-2:])


def _difference(first: Run, other: Run) -> Mapping[str, float] | None:
    a, b = first.pairs, other.pairs
    try:
        if not a or not b:
            return None
        # the same data read in another order has its pairs in another order
        places = {pair_id: place for place, pair_id in enumerate(b["pair_id"])}
        if places.keys() != set(a["pair_id"]):
            return None
        order = [places[pair_id] for pair_id in a["pair_id"]]
        gained = np.asarray(b["reward_accuracy"])[order] - np.asarray(a["reward_accuracy"])
        bootstrap = Bootstrap(a["prompt"], n_bootstrap=_N_BOOTSTRAP, seed=0)
        return bootstrap.means({"gained": gained})["gained"].as_json()
    except (KeyError, ValueError, TypeError) as error:
        raise EvaluationError(
            f"the figures of its pairs cannot be read: {error!r}",
            where=other.where,
            fix="run evaluate again",
        ) from None


def _chart(runs: Sequence[Run]) -> tuple[str, str]:
    """Title and chart: accuracy against divergence where every run has both, else accuracies."""
    points = []
    for run in runs:
        accuracy, kl = run.figure("after", "reward_accuracy"), run.figure("kl", "per_answer")
        if accuracy is None or kl is None:
            break
        points.append((run.label, kl, accuracy))
    if len(points) == len(runs):
        return "Accuracy and divergence", charts.trade_off(points)
    rows = [(run.label, run.evaluation["after"]["reward_accuracy"]) for run in runs]
    title = "reward accuracy: " + ", ".join(f"{name} {f['value']:.3f}" for name, f in rows)
    chance = runs[0].evaluation.get("chance", 0.5)
    return "Reward accuracy", charts.interval_rows(rows, title=title, chance=chance)


def _markdown(runs: Sequence[Run], same: bool, samples: Sequence[Mapping[str, Any]]) -> str:
    best = ranked(runs)[0]
    accuracy = interval_text(best.figure("after", "reward_accuracy"))
    lines = ["# Comparison", "", f"**Highest reward accuracy: {cell(best.label)}, {accuracy}.**"]
    if not same:
        lines += ["", "The runs were not measured on the same held-out pairs, as far as they say."]
    titles = ["run", *(title for title, _ in COLUMNS), "accuracy over the first", "pairs", "part"]
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for run in runs:
        cells = [cell(run.label), *(interval_text(run.figure(*keys)) for _, keys in COLUMNS)]
        cells += [interval_text(run.difference), str(run.evaluation.get("n_pairs", "–"))]
        cells += [str(run.evaluation.get("part", "all"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {cell(run.label)}: {cell(run.where)}" for run in runs)]
    return "\n".join([*lines, *_markdown_answers(runs, samples)]) + "\n"


def _markdown_answers(runs: Sequence[Run], samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answers to the first prompts, without marks."""
    lines = ["", "## Answers to the same prompts"] if samples else []
    for number, shown in enumerate(samples[:_MARKDOWN_SAMPLES], 1):
        prompt = shown["prompt"]
        lines += ["", f"### Prompt {number} ({cell(shown['dataset'])})", "", fenced(prompt)]
        for run, answer in zip(runs, shown["answers"], strict=True):
            if answer:
                lines += ["", f"{cell(run.label)}:", "", fenced(answer["plain"])]
    if len(samples) > _MARKDOWN_SAMPLES:
        lines += ["", "More are in compare.html."]
    return lines


def run_compare(arguments: Sequence[str]) -> int:
    """The command: ``RUN RUN... [output=FOLDER]``; returns its exit code.

    Raises:
        DpoError: see ``compare``.
    """
    names = [text for text in arguments if not text.startswith("output=")]
    outputs = [text.removeprefix("output=") for text in arguments if text.startswith("output=")]
    if outputs and not outputs[-1]:
        raise EvaluationError("output= names no folder", fix="output=FOLDER, or leave it out")
    if not names:
        raise ConfigError("dpo compare needs two runs or more", fix=_USAGE)
    output = Path(outputs[-1] if outputs else "comparison").expanduser()
    for run in compare(names, output):
        print(f"{interval_text(run.figure('after', 'reward_accuracy'))}  {run.label}")
    print(f"comparison: {output / 'compare.html'}")
    return 0
