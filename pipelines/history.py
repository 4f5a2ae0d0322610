"""What would run and why: each step's key compared with those of earlier local runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo.errors import RequestError
from dpo.storage.manifest import write_atomically
from pipelines.steps import SELECT, STEPS, SWEPT, TASKS

INPUTS: Mapping[str, tuple[str, ...]] = {
    "ingest": (),
    "sft": ("ingest",),
    "reference": ("ingest", "sft"),
    "preference": ("ingest", "sft", "reference"),
    "evaluate": ("ingest", "sft", "reference", "preference"),
    SELECT: ("preference", "evaluate"),
}
"""Which cached steps each cached step reads from."""


@dataclass(frozen=True)
class Expectation:
    """What will happen to a step."""

    step: str
    runs: bool
    reason: str


def with_candidates(plan: Mapping[str, str], candidates: Sequence[str]) -> dict[str, str]:
    """The plan of a run with a sweep: what its candidates change belongs to the swept steps."""
    changes = json.dumps(sorted(" ".join(json.loads(candidate)) for candidate in candidates))
    return {**plan, **({f"{step}_candidates": changes for step in SWEPT} if candidates else {})}


def steps_of(plan: Mapping[str, str]) -> tuple[str, ...]:
    """The steps of a planned run in the order in which they run."""
    return TASKS if f"{SWEPT[0]}_candidates" in plan else STEPS


def step_keys(plan: Mapping[str, str]) -> dict[str, str]:
    """One key for all that a step's result depends on: settings, fingerprints, steps before it."""
    keys: dict[str, str] = {}
    for step, inputs in INPUTS.items():
        digest = hashlib.sha256()
        names = [f"{step}_{part}" for part in ("settings", "fingerprint", "candidates")]
        parts = [plan[name] for name in names if name in plan]
        for part in parts:
            digest.update(part.encode() + b"\0")
        for name in inputs:
            digest.update(keys[name].encode())
        keys[step] = digest.hexdigest()
    return keys


def expectations(
    plan: Mapping[str, str], history: Path, rerun: Iterable[str] = ()
) -> list[Expectation]:
    """For every step whether it will run, and why, as far as earlier runs tell."""
    keys = step_keys(plan)
    earlier = _earlier(history)
    finished = {key for record in earlier for key in record["keys"].values()}
    last = earlier[-1]["plan"] if earlier else None
    forced = set(rerun)
    running: list[str] = []
    result = []
    for step in steps_of(plan):
        if step not in INPUTS:
            result.append(Expectation(step, True, "never cached"))
            continue
        upstream = [name for name in INPUTS[step] if name in running]
        if step in forced:
            reason = "asked for with --rerun"
        elif upstream:
            reason = f"reads the new output of {upstream[0]}"
        elif keys[step] in finished:
            result.append(Expectation(step, False, "nothing that it reads changed"))
            continue
        else:
            reason = _difference(step, plan, last)
        running.append(step)
        result.append(Expectation(step, True, reason))
    return result


def remember(folder: Path, plan: Mapping[str, str], states: Mapping[str, str]) -> None:
    """Keep a run's plan, its steps' states, and the keys of those that it finished or found cached.

    A run that was stopped is kept, too: what it finished is in the cache.
    """
    keys = step_keys(plan)
    whole = {step: key for step, key in keys.items() if states.get(step) in ("done", "cached")}
    record = {"plan": dict(plan), "keys": whole, "states": dict(states)}
    write_atomically(folder / "plan.json", json.dumps(record, indent=1, sort_keys=True))


def read_record(path: Path) -> dict[str, Any]:
    """What this machine kept of a run.

    Raises:
        RequestError: the file is damaged.
    """
    with suppress(ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
    raise RequestError(
        f"the record of run {path.parent.name} is damaged",
        where=str(path),
        fix="name another run, or run this one again as it was",
    )


def _earlier(history: Path) -> list[dict[str, Any]]:
    records = []
    for path in sorted(history.glob("*/plan.json")):
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            continue
    return records


def _difference(step: str, plan: Mapping[str, str], last: Mapping[str, str] | None) -> str:
    """Which of the step's inputs differs from the last run's."""
    if last is None:
        return "no earlier run"
    found = [change.text for change in changes(step, plan, last)]
    if not found:
        return "the last run did not finish it"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


Kind = Literal["data", "base model", "artifact", "code", "configuration", "image"]
_KINDS: Mapping[str, Kind] = {
    "data": "data",
    "model": "base model",
    "artifact": "artifact",
    "code": "code",
}


@dataclass(frozen=True)
class Change:
    """One input of a step that is not what it was."""

    kind: Kind
    text: str


def changes(step: str, plan: Mapping[str, str], before: Mapping[str, str]) -> list[Change]:
    """What a step reads and what differs between two plans, the sources first."""
    found: list[Change] = []
    for part in ("fingerprint", "settings"):
        name = f"{step}_{part}"
        now, then = (_flat(json.loads(p.get(name, "{}"))) for p in (plan, before))
        if part == "fingerprint" and ("artifact" in now) != ("artifact" in then):
            # the two ways have no input in common that could have changed
            way = "taken from an earlier artifact" if "artifact" in now else "no artifact is given"
            found.append(Change("artifact", way))
            continue
        for key in sorted({*now, *then}):
            if now.get(key) == then.get(key):
                continue
            if part == "fingerprint":
                found.append(Change(_KINDS.get(key, "data"), f"{key} changed"))
            else:
                values = f"{json.dumps(then.get(key))} → {json.dumps(now.get(key))}"
                found.append(Change("configuration", f"{key}: {values}"))
    varied = [_varied(step, p) for p in (before, plan)]
    if varied[0] != varied[1]:
        found.append(Change("configuration", f"candidates: {varied[0]} → {varied[1]}"))
    return found


def _varied(step: str, plan: Mapping[str, str]) -> str:
    """What the candidates of a sweep change, in words."""
    return ", ".join(json.loads(plan.get(f"{step}_candidates", "[]"))) or "none"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
