"""Waits for a run on Kubeflow and tells what happens, step by step.

The client's own waiting is not used: it hangs on a cancelled run (kubeflow/pipelines#14473) and
does not tell a failed run from a good one. The verdict is read from the store.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

from dpo.errors import DpoError, PipelineError
from dpo.storage.runs import read_run_manifest
from pipelines.cluster import ENDED, Endpoint, link
from pipelines.connection import ANSWER_SECONDS, NotTheApi, pair
from pipelines.events import Watcher, advice
from pipelines.outcome import Outcome
from pipelines.steps import SWEPT, TASKS, step_of
from pipelines.trouble import EarlierEnd, Trouble
from pipelines.workflow import EXECUTOR, OMITTED, Linker, plain_name

_FIRST_POLL_SECONDS = 0.2
_POLL_SECONDS = 5.0
_LEAST_SECONDS = 1.0
"""For the last answer, where the time is nearly over."""
_AWAY_SECONDS = 600.0
"""How long an endpoint may be away while somebody waits without a limit."""
_LOG_LINES = 8
_OF_KUBEFLOW = re.compile(
    r"[IWEF]\d{4} [\d:.]+ +\d+ \S+\.go:\d+\]|time=\S+ level=|\{\"time\":\"[^\"]*\",\"level\":"
    r"|Error: exit status |\[KFP Executor "
)
"""Lines with which its launcher and Argo surround what a step says, half a dozen at the end."""
_ITERATION = re.compile(r"\((\d+):[^)]*\)$")
_WORDS = {"SUCCEEDED": "done", "SKIPPED": "skipped", OMITTED: "skipped"}


def wait(
    client: Any,
    target: Endpoint,
    run_id: str,
    *,
    store: str,
    timeout_seconds: float | None,
    say: Callable[[str], None],
    away_seconds: float | None = None,
    earlier: EarlierEnd | None = None,
) -> Outcome:
    """Poll until the run has ended or the time is over.

    Args:
        client: From ``pipelines.cluster.connect``.
        target: Where it is connected to.
        run_id: The run.
        store: URL that the run publishes to and leaves its manifest in.
        timeout_seconds: None waits for ever.
        say: Takes one line for each change of a step.
        away_seconds: How long the endpoint may be away where there is no time limit; None is what
            somebody waits who watches.
        earlier: The end of a run that was let go on since.

    Returns:
        How the run ended; ``timed out`` or ``unknown`` where it may go on.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    outcome = Outcome("timed out", run_id, where=link(target, run_id))
    away = _AWAY_SECONDS if away_seconds is None else away_seconds
    trouble = Trouble(target, away if deadline is None else math.inf)
    pause = _FIRST_POLL_SECONDS
    watcher = Watcher(run_id, target.namespace)
    linker = Linker(client)
    tried: dict[str, int] = {}
    while (left := _left(deadline)) > 0:
        try:
            run = _ask(client, run_id, min(ANSWER_SECONDS, left))
        except Exception as error:
            if trouble.is_final(error, say):
                return trouble.ended(outcome)
        else:
            trouble.over()
            left = max(_LEAST_SECONDS, _left(deadline))
            if earlier is None or not earlier.is_told(run):
                _report_steps(linker.linked(run, min(ANSWER_SECONDS, left)), outcome, say)
                _report_attempts(run, tried, say)
                if run.state in ENDED:
                    return _ended(client, run, outcome, store, watcher)
                for text in watcher.news():
                    say(text)
        time.sleep(max(0.0, min(pause, _left(deadline))))
        pause = min(pause * 1.5, _POLL_SECONDS)
    outcome.message = f"the run has not ended after {timeout_seconds:g} s; it goes on"
    if trouble.last:
        outcome.message += f"\n{trouble.last}"
    return outcome


def _left(deadline: float | None) -> float:
    return math.inf if deadline is None else deadline - time.monotonic()


def _ask(client: Any, run_id: str, seconds: float) -> Any:
    """The run; kfp's own method takes no time limit, and an empty answer for a run."""
    run = client._run_api.run_service_get_run(run_id, _request_timeout=pair(seconds))
    if getattr(run, "run_id", None) != run_id:
        raise NotTheApi("it sent an answer that tells of no run")
    return run


def step_states(run: Any) -> dict[str, str]:
    """State of each step that the run API tells of: done, cached, running, failed and so on.

    A step of several tasks (the candidates of a sweep) has failed when one has, and goes on while
    one does.
    """
    words: dict[str, list[str]] = {}
    for name, task in _steps(run):
        if not _has_state(run, task):
            continue
        words.setdefault(name, []).append(_word(run, task))
    return {name: min(found, key=_weight) for name, found in words.items()}


def _has_state(run: Any, task: Any) -> bool:
    """A task of a run that goes on may just not have its state yet."""
    return bool(task.state) and (task.state != OMITTED or run.state in ENDED)


def _word(run: Any, task: Any) -> str:
    word = _WORDS.get(task.state, task.state.lower())
    skipped = any(child.state == "SKIPPED" for child in _children(run, task))
    return "cached" if word == "done" and skipped else word


def candidate_states(run: Any) -> dict[int, dict[str, str]]:
    """Of a sweep, by the candidate's place in it: the state of each of its steps.

    A task of a loop is known by the group of its iteration, ``iteration-iterations(1:1)``, from
    which the links between tasks lead to it. Where they do not, nothing is told.
    """
    details = getattr(run.run_details, "task_details", None) or []
    before: dict[str, list[Any]] = {}
    for task in details:
        for child in _children(run, task):
            before.setdefault(_name(child), []).append(task)
    found: dict[int, dict[str, list[str]]] = {}
    for task in details:
        name = plain_name(task)
        if name not in SWEPT or not _has_state(run, task):
            continue
        if (place := _iteration(task, before)) is not None:
            found.setdefault(place, {}).setdefault(name, []).append(_word(run, task))
    return {
        place: {name: min(words, key=_weight) for name, words in steps.items()}
        for place, steps in sorted(found.items())
    }


def _iteration(task: Any, before: Mapping[str, list[Any]]) -> int | None:
    """The nearest iteration that leads to a task."""
    seen: set[str] = set()
    near = [task]
    while near:
        for one in near:
            if match := _ITERATION.search(one.display_name or ""):
                return int(match[1])
        names = {_name(one) for one in near} - seen
        seen |= names
        near = [other for name in names for other in before.get(name, [])]
    return None


def _name(task: Any) -> str:
    return str(task.task_id or task.pod_name)


def _weight(word: str) -> int:
    """Which of several tasks' states is their step's: the lowest."""
    return {"failed": 0, "done": 2, "cached": 3, "skipped": 4}.get(word, 1)


def _report_steps(run: Any, outcome: Outcome, say: Callable[[str], None]) -> None:
    for name, word in step_states(run).items():
        if outcome.steps.get(name) != word:
            outcome.steps[name] = word
            say(f"{name}: {word}")


def _report_attempts(run: Any, told: dict[str, int], say: Callable[[str], None]) -> None:
    """A step that is tried again, and how the attempt before ended: its state stays ``running``.

    Args:
        run: With its tasks linked.
        told: By task, the number of attempts that were told of.
        say: Takes one line for each further attempt.
    """
    for name, task in _steps(run):
        attempts = [one for one in _attempts(run, task) if _attempt(one) >= 0]
        if (number := len(attempts)) > max(1, told.get(_name(task), 1)):
            told[_name(task)] = number
            why = _message(attempts[-2].error)
            say(f"{name}: attempt {number}, for the one before ended" + (f": {why}" if why else ""))


def _steps(run: Any) -> Iterable[tuple[str, Any]]:
    """Our steps among the run's tasks, which also hold drivers, executors and conditions."""
    details = getattr(run.run_details, "task_details", None) or []
    for task in details:
        name = step_of(plain_name(task))
        if name in TASKS:
            yield name, task


def _children(run: Any, task: Any) -> list[Any]:
    named = {name for child in task.child_tasks or [] for name in _names(child)}
    details = run.run_details.task_details
    return [other for other in details if _names(other) & named]


def _names(task: Any) -> set[str]:
    """By what tasks are linked."""
    return set(filter(None, [task.task_id, task.pod_name]))


def _ended(client: Any, run: Any, outcome: Outcome, store: str, watcher: Watcher) -> Outcome:
    history = [status.state for status in run.state_history or []]
    if run.state == "CANCELED" or "CANCELING" in history[_last_start(history) :]:
        # a terminated run ends as FAILED
        outcome.state = "cancelled"
        return outcome
    if run.state != "SUCCEEDED":
        outcome.state = "failed"
        outcome.message = _failure(client, run, watcher)
        return outcome
    # task outputs are empty in the run API (kubeflow/pipelines#9858): the store knows the verdict
    try:
        manifest = read_run_manifest(store, outcome.run_id)
        if "verdict" not in manifest:
            raise PipelineError(
                f"run {outcome.run_id} succeeded, but its manifest in the store holds no verdict",
                where=store,
                fix="look at its gate in the UI",
            )
    except DpoError as error:
        # whatever it is: the run itself has ended well
        return _without_store(outcome, error)
    outcome.verdict = manifest["verdict"]
    outcome.published = manifest.get("published") or {}
    if url := outcome.published.get("url"):
        outcome.places["published model"] = url
    outcome.evaluation = manifest.get("evaluation") or {}
    outcome.state = "succeeded" if outcome.verdict["approved"] else "refused"
    return outcome


def _without_store(outcome: Outcome, error: DpoError) -> Outcome:
    """The store may answer inside the cluster only: whether ``publish`` ran tells the verdict."""
    published = outcome.steps.get("publish") == "done"
    if not published and outcome.steps.get("gate") != "done":
        outcome.state = "unknown"
        outcome.message = f"the run ended well, and its verdict is not known:\n{error}"
        return outcome
    outcome.state = "succeeded" if published else "refused"
    outcome.message = (
        f"the verdict is read from the run's steps, for its manifest cannot be read from here:\n"
        f"{error}"
    )
    return outcome


def _last_start(history: list[str]) -> int:
    """Where the last attempt begins: a retried run keeps the history of those before."""
    ends = [place for place, state in enumerate(history[:-1]) if state in ENDED]
    return ends[-1] + 1 if ends else 0


def _failure(client: Any, run: Any, watcher: Watcher) -> str:
    """Which step failed, what Kubernetes and its own log say about it, and what to do."""
    parts = []
    reasons = watcher.reasons()
    failed = [(name, "failed", task) for name, task in _steps(run) if task.state == "FAILED"]
    failed += [(name, "could not be started:", task) for name, task in _failed_drivers(run)]
    for name, what, task in failed:
        related = [task, *_attempts(run, task)]
        words = [*(_message(item.error) for item in related), *reasons.get(name, [])]
        log = _log(client, run.run_id, reversed(related))
        parts.append(" ".join([f"step {name} {what}", *dict.fromkeys(filter(None, words))]))
        parts += [f"  | {line}" for line in _own(log)]
        # of a process that was killed the launcher alone tells
        parts += advice(" ".join([*words, *_own(log), *log[-_LOG_LINES:]]), name, run.run_id)
    return "\n".join([*parts, *filter(None, [_message(run.error)])]) or "failed: see the UI"


def _failed_drivers(run: Any) -> Iterable[tuple[str, Any]]:
    """Steps that Kubeflow's own part did not start, each with the task of its driver."""
    for task in getattr(run.run_details, "task_details", None) or []:
        name, driver, _ = plain_name(task).partition("-driver")
        if driver and task.state == "FAILED" and step_of(name) in TASKS:
            yield step_of(name), task


def _attempts(run: Any, task: Any) -> list[Any]:
    """The executors of a step, the last attempt last; with retries they are behind another task."""
    found: list[Any] = []
    near = [task]
    while near:
        near = [
            child
            for one in near
            for child in _children(run, one)
            # an executor also links to what comes after the step
            if plain_name(child) == EXECUTOR and child not in found
        ]
        found += sorted(near, key=_attempt)
    return found


def _attempt(task: Any) -> int:
    match = re.search(r"\((\d+)\)$", task.display_name or "")
    return int(match[1]) if match else -1


def _message(error: Any) -> str:
    return str(getattr(error, "message", None) or "")


def _log(client: Any, run_id: str, tasks: Iterable[Any]) -> list[str]:
    """What the failed pod said, where the backend still has it."""
    for pod in filter(None, (task.pod_name for task in tasks)):
        try:
            text = client._run_api.api_client.call_api(
                f"/apis/v1alpha1/runs/{quote(run_id)}/nodes/{quote(pod)}/log",
                "GET",
                response_type="str",
                auth_settings=["Bearer"],
                _return_http_data_only=True,
                _request_timeout=20,
            )
        except Exception:  # nosec B112
            # the reason that the run itself gives is shown all the same
            continue
        return [line.rstrip() for line in str(text).splitlines() if line.strip()]
    return []


def _own(log: list[str]) -> list[str]:
    """The last lines that are the step's own."""
    own = [line for line in log if not _OF_KUBEFLOW.match(line)]
    return (own or log)[-_LOG_LINES:]
