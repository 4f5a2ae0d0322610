"""Carries out one run and keeps its record up to date: here in a process, or on Kubeflow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dpo.errors import DpoError
from dpo.storage import progress
from dpo.storage.manifest import sha256_file
from dpo.storage.processes import repeated
from dpo.storage.runs import run_prefix
from dpo.storage.store import open_store
from pipelines import package
from pipelines.display import RunView
from pipelines.local import own_code
from pipelines.outcome import Outcome
from pipelines.service.database import Database, Run, State
from pipelines.service.one_run import JOB, OUTCOME, RUNS
from pipelines.service.settings import Settings
from pipelines.steps import STEPS

_POLL_SECONDS = 0.5
_STOP_SECONDS = 45.0
_STATES: dict[str, State] = {
    "succeeded": "succeeded",
    "refused": "refused",
    "cancelled": "cancelled",
    "unknown": "unknown",
}
_FIGURES = ("reward_accuracy", "accuracy_sum", "accuracy_per_token", "reward_margin", "loss")
_MOST_MESSAGE_CHARS = 4000
_BACKEND_WORDS = {"pending": "waiting"}
_AWAY_SECONDS = 6 * 3600.0
"""An endpoint may be upgraded while its run goes on; one that is gone must not keep its place."""
_CHECKOUT = Path(__file__).resolve().parents[2]
_GLOBALS = threading.Lock()
"""Hydra and kfp's compiler keep what they are at in globals, and runs are sent by threads."""


def carry_out(run: Run, settings: Settings, database: Database) -> None:
    """Run the pipeline for ``run`` and settle its record, whatever happens but a crash."""
    with _GLOBALS:
        parameters = settings.run_parameters(run.data_url, run.community)
    try:
        if os.environ.get("KF_PIPELINES_ENDPOINT"):
            _on_cluster(run, parameters, settings, database)
        else:
            with work_folder(settings, run.id) as folder:
                _here(run, parameters, folder, settings, database)
    except DpoError as error:
        database.end(run.id, "failed", message=_readable(str(error), settings))


@contextmanager
def work_folder(settings: Settings, run_id: str) -> Iterator[Path]:
    """Folder of a run's temporary files, removed in every outcome; after a crash it is used on."""
    folder = settings.data_dir.absolute() / "work" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(settings: Settings, database: Database) -> None:
    """Remove the work folders of runs that have ended."""
    for folder in (settings.data_dir.absolute() / "work").glob("*"):
        run = database.get(folder.name, None)
        if run is None or run.ended is not None:
            shutil.rmtree(folder, ignore_errors=True)


# --- here ---


def _here(
    run: Run, parameters: dict[str, Any], folder: Path, settings: Settings, database: Database
) -> None:
    (folder / JOB).write_text(json.dumps(parameters), encoding="utf-8")
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.service.one_run", str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # in the folder that the service was started in: relative paths of its settings mean it
            env={**_environment(), **own_code()},
        )
    try:
        cancelled = _follow(process, run, folder, database)
    finally:
        _stop(process)
    if cancelled:
        database.end(run.id, "cancelled", message="cancelled while running")
    elif not (folder / OUTCOME).is_file():
        raise DpoError(f"the run's process ended with exit code {process.returncode}")
    else:
        values = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        _settle(run, Outcome(**values), settings, database)


def _environment() -> dict[str, str]:
    """A run needs the store's credentials, and none of the service's own secrets."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DPO_SERVICE")}


def _follow(process: subprocess.Popen[bytes], run: Run, folder: Path, database: Database) -> bool:
    """Keep the steps of the record current until the process ends; whether to cancel it."""
    view = RunView.of(STEPS)
    shown: list[dict[str, Any]] = []
    events: Path | None = None
    offset = 0
    while True:
        ended = process.poll() is not None
        newest = max((folder / RUNS / "history").glob("*/progress.jsonl"), default=None)
        if newest != events:
            # what a killed worker left is older than what this run writes
            events, offset, view = newest, 0, RunView.of(STEPS)
        if events is not None:
            found, offset = progress.read_events(events, offset)
            for event in found:
                view.apply(event)
        if ended:
            view.finish()
        steps = _steps(view)
        if steps != shown:
            database.update(run.id, steps=steps)
            shown = steps
        if ended:
            return False
        if database.cancelling(run.id):
            return True
        time.sleep(_POLL_SECONDS)


def _steps(view: RunView) -> list[dict[str, Any]]:
    return [
        {
            "name": step.name,
            "state": step.state,
            "done": step.done,
            "total": step.total,
            "unit": step.unit,
            "seconds": round(step.seconds, 1),
        }
        for step in view.steps.values()
    ]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the run's process, which ends its steps; the whole group when it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _settle(run: Run, outcome: Outcome, settings: Settings, database: Database) -> None:
    report_key = None
    report = Path(outcome.places.get("report", ""))
    if report.is_file():
        report_key = f"{run_prefix(run.id)}/report.html"
        store = open_store(settings.community_store(run.community))
        store.upload(report, report_key, sha256_file(report))
    _end(run, outcome, report_key, settings, database)


def _end(
    run: Run, outcome: Outcome, report_key: str | None, settings: Settings, database: Database
) -> None:
    database.end(
        run.id,
        _STATES.get(outcome.state, "failed"),
        message=_readable(outcome.message or _verdict_text(outcome), settings),
        metrics=_metrics(outcome),
        report_key=report_key,
        model_url=outcome.published.get("url"),
    )


def _metrics(outcome: Outcome) -> dict[str, Any]:
    after = outcome.evaluation.get("after", {})
    return {name: after[name] for name in _FIGURES if isinstance(after.get(name), dict)}


def _verdict_text(outcome: Outcome) -> str:
    rules = outcome.verdict.get("rules", [])
    return "; ".join(rule["explanation"] for rule in rules if not rule["passed"])


def _readable(message: str, settings: Settings) -> str:
    """A message without this machine's paths, for the community that reads it."""
    data = settings.data_dir
    places = {data.absolute(), data.resolve(), Path.cwd(), Path.home(), _CHECKOUT}
    # as they are and as URLs have them; the longest first, for one may lie in another
    names = {name for place in places for name in (str(place), quote(str(place)))}
    for name in sorted(names - {"/"}, key=len, reverse=True):
        message = re.sub(rf"{re.escape(name)}(?![\w-]|\.\w)", "...", message)
    return message[:_MOST_MESSAGE_CHARS]


# --- on Kubeflow ---


def _on_cluster(
    run: Run, parameters: dict[str, Any], settings: Settings, database: Database
) -> None:
    from pipelines import cluster
    from pipelines.watch import wait

    target = cluster.endpoint()
    client = cluster.connect(target)
    backend_run = run.backend_run or _submit(client, target, parameters, run.id, settings)
    database.update(run.id, backend_run=backend_run)
    states = dict.fromkeys(STEPS, "waiting")

    def say(text: str) -> None:
        # "STEP: STATE", or "STEP: waiting: REASON" and advice for the operator
        name, _, state = text.partition(": ")
        if name not in states:
            # about the endpoint
            return
        state = state.partition(": ")[0]
        states[name] = _BACKEND_WORDS.get(state, state)
        database.update(run.id, steps=_named(states))

    with _cancelling(run, database, lambda: cluster.cancel(client, target, backend_run)):
        outcome = wait(
            client,
            target,
            backend_run,
            store=parameters["publish_store"],
            timeout_seconds=None,
            say=say,
            away_seconds=_AWAY_SECONDS,
        )
    report_key = f"{run_prefix(backend_run)}/report.html" if outcome.verdict else None
    left_out = {name: "skipped" for name, state in states.items() if state == "waiting"}
    database.update(run.id, steps=_named(states | left_out))
    _end(run, outcome, report_key, settings, database)


def _named(states: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "state": state} for name, state in states.items()]


def _submit(
    client: Any, target: Any, parameters: dict[str, Any], name: str, settings: Settings
) -> str:
    from pipelines import sending
    from pipelines.deployment import load_deployment
    from pipelines.request import check_texts
    from pipelines.shared_places import check_places

    check_texts(parameters)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "package.yaml")
        deployment = load_deployment(settings.deployment)
        with _GLOBALS:
            documents = package.deployed_package(deployment)
        package.keep_checkpoints(documents, parameters["publish_store"])
        check_places(documents, parameters)
        package.save_package(documents, path)
        return sending.submit_once(client, target, path, parameters, name)


@contextmanager
def _cancelling(run: Run, database: Database, cancel: Callable[[], None]) -> Iterator[None]:
    """Inside the block, a request to cancel ``run`` reaches the backend."""

    def cancelled() -> bool:
        asked = database.cancelling(run.id)
        if asked:
            cancel()
        return asked

    with repeated(cancelled, _POLL_SECONDS * 4, f"cancelling {run.id}"):
        yield
