"""``submit.py explain``: for each step of a run whether it was executed, and what made it so.

A run on Kubeflow is explained from its manifest in the store, which its first step begins with the
plan, and from the states that the endpoint tells where one is given; a local run from its history.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo.config.arguments import Arguments
from dpo.config.stages import STAGES
from dpo.errors import ArtifactError, ObjectMissing, RequestError
from dpo.storage.runs import MANIFEST_NAME, parse_run
from dpo.storage.store import Store, open_store
from pipelines import cluster
from pipelines.asked import not_empty, place
from pipelines.history import INPUTS, changes, read_record, steps_of, with_candidates
from pipelines.start import known_run, store_of
from pipelines.steps import SELECT, SWEPT, TASKS
from pipelines.watch import candidate_states, step_states
from pipelines.workflow import Linker

_ENDED_EARLY = {"failed": "it failed or was stopped", "skipped": "a step before it failed"}
_DATA_IMAGE_STEPS = {"ingest", "gate", "publish"}


@dataclass(frozen=True)
class Told:
    """What is known of one run."""

    run_id: str
    plan: Mapping[str, str]
    states: Mapping[str, str]
    images: Mapping[str, str]
    candidates: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Of a sweep: what each candidate changes, and the states of its steps, where they are told."""


@dataclass(frozen=True)
class Line:
    """One step: what became of it, and why."""

    step: str
    state: str
    """done, cached, failed, skipped or unknown."""
    changed: dict[str, list[str]]
    """By kind of input (data, base model, artifact, code, configuration, image)."""
    reason: str


def parser() -> Arguments:
    """The command line of ``submit.py explain``."""
    this = Arguments(
        prog="python pipelines/submit.py explain",
        description="Say for each step of a run whether it was executed or came from the cache, "
        "and which of its inputs differ from the run before.",
    )
    this.add_argument("run_id", nargs="?", type=not_empty, help="default: the last local run")
    this.add_argument("--runs-dir", type=place, help="folder of local runs (default: runs)")
    for name, meaning in (
        ("--store", "store that a run on Kubeflow published to"),
        ("--endpoint", "Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)"),
        ("--namespace", "profile namespace"),
    ):
        this.add_argument(name, type=not_empty, help=meaning)
    this.add_argument("--output", choices=["text", "json"], default="text")
    return this


def main(options: argparse.Namespace, runs: Path) -> int:
    """Explain one run; returns the exit code.

    Raises:
        DpoError: there is no such run, or nothing is known of it.
    """
    history = runs / "history"
    if options.run_id is None or (history / options.run_id).is_dir():
        run, before = _local(history, options.run_id)
    else:
        run, before = _remote(options)
    lines = explain(run, before)
    if options.output == "json":
        steps = {line.step: asdict(line) for line in lines}
        told = {"run_id": run.run_id, "before": _id(before), "steps": steps}
        print(json.dumps({**told, **({"candidates": run.candidates} if run.candidates else {})}))
        return 0
    _show(run, before, lines)
    return 0


def explain(run: Told, before: Told | None) -> list[Line]:
    """For every step what became of it and what differs from ``before``."""
    lines: list[Line] = []
    new: list[str] = []
    for step in TASKS if SELECT in run.states else steps_of(run.plan):
        state = run.states.get(step, "unknown")
        changed = _changed(step, run, before)
        upstream = [name for name in INPUTS.get(step, ()) if name in new]
        if step in INPUTS and (changed or upstream or state == "done"):
            new.append(step)
        lines.append(Line(step, state, changed, _reason(step, state, changed, upstream, before)))
    return lines


def _changed(step: str, run: Told, before: Told | None) -> dict[str, list[str]]:
    if before is None or step not in STAGES:
        return {}
    found: dict[str, list[str]] = {}
    for change in changes(step, run.plan, before.plan):
        found.setdefault(change.kind, []).append(change.text)
    image = "data" if step in _DATA_IMAGE_STEPS else "train"
    now, then = run.images.get(image), before.images.get(image)
    if now != then:
        found["image"] = [f"{then} → {now}"]
    return found


def _reason(
    step: str,
    state: str,
    changed: Mapping[str, list[str]],
    upstream: list[str],
    before: Told | None,
) -> str:
    if step not in INPUTS:
        return "never cached"
    parts = [f"{kind}: {', '.join(texts)}" for kind, texts in changed.items()]
    if upstream:
        parts.append(f"reads the new output of {', '.join(upstream)}")
    if parts:
        return "; ".join(parts)
    if state in _ENDED_EARLY:
        return _ENDED_EARLY[state]
    if before is None:
        return "no earlier run to compare with"
    if state == "done" and before.states.get(step) in _ENDED_EARLY:
        return "the run before did not finish it"
    if state == "done":
        return "asked for with --rerun, or the earlier result was lost"
    return "nothing that it reads changed"


# --- where runs are known from ---


def _local(history: Path, run_id: str | None) -> tuple[Told, Told | None]:
    known = sorted(path.parent.name for path in history.glob("*/plan.json"))
    run_id = run_id or (known[-1] if known else None)
    if run_id is None or run_id not in known:
        raise RequestError(
            f"no plan of run {run_id} was kept" if run_id else "there is no local run yet",
            where=str(history),
            fix="name a run of this folder, or pass --store URL for a run on Kubeflow",
        )
    earlier = [name for name in known if name < run_id]
    return _read_local(history / run_id), _read_local(history / earlier[-1]) if earlier else None


def _read_local(folder: Path) -> Told:
    record = read_record(folder / "plan.json")
    plan, states = record["plan"], record.get("states") or {}
    names = json.loads(plan.get(f"{SWEPT[0]}_candidates", "[]"))
    return Told(folder.name, plan, states, {}, {name: {} for name in names})


def _remote(options: argparse.Namespace) -> tuple[Told, Told | None]:
    states: Mapping[str, str] = {}
    of_candidates: Mapping[int, Mapping[str, str]] = {}
    url = options.store
    if options.endpoint or cluster.is_configured():
        target = cluster.endpoint(options.endpoint, options.namespace)
        try:
            client = cluster.connect(target)
            run = Linker(client).linked(cluster.get_run(client, target, options.run_id))
        except RequestError as error:
            if not url:
                raise
            # deleted in Kubeflow, perhaps: its manifest is in the store all the same
            print(f"{error.found}: the states of its steps are not known", file=sys.stderr)
        else:
            states, of_candidates = step_states(run), candidate_states(run)
            url = url or store_of(client, target, run)
    if not url:
        raise RequestError(
            f"nothing is known of run {options.run_id}",
            fix="pass --store URL of the store it published to, or set KF_PIPELINES_ENDPOINT",
        )
    manifest = known_run(url, options.run_id)
    before = _run_before(open_store(url), manifest)
    return _told(manifest, states, of_candidates), _told(before) if before else None


def _told(
    manifest: Mapping[str, Any],
    states: Mapping[str, str] | None = None,
    of_candidates: Mapping[int, Mapping[str, str]] | None = None,
) -> Told:
    if "plan" not in manifest:
        raise RequestError(
            f"the manifest of run {manifest['run_id']} holds no plan",
            fix="it was made by an older version of the pipeline; start a run with this one",
        )
    candidates = manifest.get("candidates") or []
    return Told(
        manifest["run_id"],
        with_candidates(manifest["plan"], candidates),
        states or {},
        manifest.get("images") or {},
        {
            " ".join(json.loads(candidate)): (of_candidates or {}).get(place, {})
            for place, candidate in enumerate(candidates)
        },
    )


def _run_before(store: Store, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last run of the same name that began earlier and left a plan."""
    began, name = manifest.get("began", ""), _name(manifest)
    found: list[dict[str, Any]] = []
    for key in store.list("runs/"):
        if key.endswith(f"/{MANIFEST_NAME}") and key.count("/") == 2:
            # one that is damaged, or was removed meanwhile, is none to compare with
            with suppress(ArtifactError, ObjectMissing):
                other = parse_run(store.read(key), store.url(key))
                if "plan" in other and _name(other) == name and other.get("began", "") < began:
                    found.append(other)
    return max(found, key=lambda other: str(other["began"]), default=None)


def _name(manifest: Mapping[str, Any]) -> str:
    return str((manifest.get("parameters") or {}).get("publish_name", ""))


def _id(run: Told | None) -> str | None:
    return run.run_id if run else None


def _show(run: Told, before: Told | None, lines: list[Line]) -> None:
    console = Console()
    text = f"Run {run.run_id}, compared with {before.run_id}" if before else f"Run {run.run_id}"
    console.print(text, highlight=False, markup=False)
    table = Table(box=None)
    for heading in ("step", "", "why"):
        table.add_column(heading, overflow="fold")
    for line in lines:
        table.add_row(line.step, _shown(line.state), escape(line.reason))
    console.print(table)
    for candidate, states in run.candidates.items():
        each = [f"{step} {_shown(state)}" for step, state in states.items()]
        text = f"candidate {candidate}{': ' if each else ''}{', '.join(each)}"
        console.print(text, highlight=False, markup=False)


def _shown(state: str) -> str:
    return {"done": "executed"}.get(state, state)
