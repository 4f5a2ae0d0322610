"""One policy or several: the part of the DAG between the reference and the gate.

A sweep is chosen when the package is compiled. Its candidates share pairs, SFT model and
log-probabilities; the best on the validation part of the held-out pairs is evaluated on the test
part, which the selection never saw, and goes through the gate.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from dpo.config.parameters import PARAMETERS, route
from dpo.config.stages import OUT_OF_BAND, STAGE_KEYS
from dpo.errors import ConfigError

_MOST_CANDIDATES = 32
_VARIED = STAGE_KEYS["preference"] - OUT_OF_BAND - {"n_eval_examples"}
"""Candidates are compared by one measure, so they differ in their training alone."""


@dataclass(frozen=True)
class Sweep:
    """What is varied."""

    candidates: tuple[str, ...] = ()
    """Of each candidate the settings that it changes, as a JSON list of ``KEY=VALUE``; none
    trains one policy."""
    parallelism: int = 0
    """Candidates at a time; 0 sets no limit."""


NO_SWEEP = Sweep()
_compiled: ContextVar[Sweep] = ContextVar("sweep", default=NO_SWEEP)


@contextmanager
def compiled_with(sweep: Sweep) -> Iterator[None]:
    """The pipeline is compiled with this sweep inside the block."""
    token = _compiled.set(sweep)
    try:
        yield
    finally:
        _compiled.reset(token)


def compiled() -> Sweep:
    """The sweep that the pipeline is being compiled with."""
    return _compiled.get()


def parse_sweep(assignments: Iterable[str]) -> tuple[str, ...]:
    """The candidates of ``KEY=VALUE,VALUE`` assignments: every combination of them.

    Raises:
        ConfigError: not a key and values, a key that is no setting of preference training, or too
            many combinations.
    """
    axes = [_axis(assignment) for assignment in assignments]
    if not axes:
        return ()
    keys = [axis[0].partition("=")[0] for axis in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(
            f"--sweep varies {twice[0]} twice", fix=f"name all its values in one: {twice[0]}=V,V"
        )
    combinations = [list(items) for items in itertools.product(*axes)]
    if len(combinations) > _MOST_CANDIDATES:
        raise ConfigError(
            f"the sweep has {len(combinations)} candidates, more than {_MOST_CANDIDATES}",
            where="--sweep",
            fix="vary fewer values",
        )
    return tuple(json.dumps(items) for items in combinations)


def _axis(assignment: str) -> list[str]:
    key, _, text = assignment.partition("=")
    parameter = PARAMETERS.get(key)
    if parameter and parameter.sides == ("preference",):
        key = parameter.key
    key = key.removeprefix("preference.")
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not key or not values:
        raise ConfigError(
            f"--sweep {assignment} is not KEY=VALUE,VALUE", fix="such as loss.beta=0.05,0.1,0.5"
        )
    if len({_meant(value) for value in values}) != len(values):
        raise ConfigError(f"--sweep {assignment} names a value twice", fix="name each once")
    for value in values:
        # refuses what is no setting of preference training
        name, _ = route(f"{key}={value}" if key.startswith("loss") else f"preference.{key}={value}")
        if not name.startswith("preference_") or key.partition(".")[0] not in _VARIED:
            raise ConfigError(
                f"--sweep varies preference training, and {key} is not of it",
                fix="vary loss, loss.beta, lr or another setting of it",
            )
    return [f"{key}={value}" for value in values]


def _meant(value: str) -> str:
    """One text for all spellings of a number."""
    try:
        return repr(float(value))
    except ValueError:
        return value


def assignments_of(candidate: str) -> list[str]:
    """A candidate as assignments of a run, to check its settings before it is started."""
    changes: Sequence[str] = json.loads(candidate)
    return [c if c.startswith("loss") else f"preference.{c}" for c in changes]


def train_and_judge(
    planned: Mapping[str, Any], *, pairs: Any, model: Any, log_probs: Any
) -> tuple[Any, Any]:
    """Tasks from preference training to the evaluation that the gate reads.

    Args:
        planned: Outputs of ``fingerprint``.
        pairs: Output of ingest.
        model: Checkpoint of SFT.
        log_probs: Output of reference.

    Returns:
        The policy and the evaluation that go through the gate.
    """
    from kfp import dsl

    from components.evaluate import evaluate
    from components.preference import preference
    from components.select import select

    def train(overrides: Any = "") -> Any:
        return preference(
            settings=planned["preference_settings"],
            fingerprint=planned["preference_fingerprint"],
            pairs=pairs,
            model=model,
            log_probs=log_probs,
            overrides=overrides,
        ).outputs["policy"]

    def judge(policy: Any, overrides: Any = "", part: str = "") -> Any:
        return evaluate(
            settings=planned["evaluate_settings"],
            fingerprint=planned["evaluate_fingerprint"],
            pairs=pairs,
            sft=model,
            policy=policy,
            log_probs=log_probs,
            overrides=overrides,
            part=part,
        ).outputs["evaluation"]

    sweep = compiled()
    if not sweep.candidates:
        policy = train()
        return policy, judge(policy)
    candidates = list(sweep.candidates)
    # no name: dsl.Collected finds the loop by its key (kubeflow/pipelines#13239)
    with dsl.ParallelFor(candidates, parallelism=sweep.parallelism or None) as one:
        policies = train(one)
        judged = judge(policies, one, "validation")
    best = select(
        policies=dsl.Collected(policies), evaluations=dsl.Collected(judged), candidates=candidates
    )
    return best.outputs["policy"], judge(best.outputs["policy"], best.outputs["Output"], "test")
