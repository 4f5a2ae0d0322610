"""What ``submit.py`` does with an endpoint: register, schedule, start, go on with, wait for."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from dpo.errors import ConfigError, PipelineError
from pipelines import cluster, package, sending
from pipelines.asked import not_empty, passed_over
from pipelines.outcome import Outcome
from pipelines.request import check_texts
from pipelines.shared_places import check_inputs, check_places
from pipelines.start import check_ours
from pipelines.trouble import EarlierEnd
from pipelines.watch import wait

_LONGEST_NAME = 255


def add_options(this: argparse.ArgumentParser) -> None:
    """The options that only an endpoint has."""
    group = this.add_argument_group("on Kubeflow")
    group.add_argument(
        "--upload",
        action="store_true",
        help="register the package under its name; with --wait or --run also start a run of it, "
        "with --schedule runs of it at set times",
    )
    group.add_argument("--run", action="store_true", help="with --upload: start a run as well")
    group.add_argument(
        "--schedule",
        type=not_empty,
        metavar="CRON",
        help='start runs at set times instead of now: "0 0 3 * * *" is every night at three',
    )
    group.add_argument(
        "--retry",
        type=not_empty,
        metavar="RUN_ID",
        help="let a failed run go on where it failed, as it was sent",
    )
    group.add_argument("--cancel", type=not_empty, metavar="RUN_ID", help="end a run")


def needs_a_store(options: argparse.Namespace) -> bool:
    """Whether the command starts a run of its own; a retried one knows its store."""
    if options.cancel or options.retry:
        return False
    return bool(not options.upload or options.run or options.wait or options.schedule)


def run_on_cluster(
    options: argparse.Namespace, documents: list[dict[str, Any]], values: Mapping[str, Any]
) -> Outcome:
    """Do what the options ask of the endpoint.

    Raises:
        ConfigError: what the run writes would not outlive its pods.
        PipelineError: the endpoint does not answer or refuses.
        KeyboardInterrupt: with a text that says what goes on, and the run's id.
    """
    target = cluster.endpoint(options.endpoint, options.namespace, options.experiment)
    if not (options.cancel or options.retry):
        check_texts(values)
        check_places(documents, values)
        check_inputs(documents, values)
    client = cluster.connect(target)
    run = None
    if options.retry:
        run = cluster.get_run(client, target, options.retry)
        check_ours(client, target, run)
    if text := passed_over(options):
        print(text, file=sys.stderr)
    if options.cancel:
        cluster.cancel(client, target, options.cancel)
        print(f"asked the endpoint to end run {options.cancel}", file=sys.stderr)
        return Outcome("submitted", options.cancel, where=cluster.link(target, options.cancel))
    if run:
        values = {**values, **cluster.parameters_of(run)}
        sending.retry(client, target, options.retry)
        return _follow(options, client, target, options.retry, values, EarlierEnd(run))
    name = name_of(options.run_name, values)
    with tempfile.TemporaryDirectory() as folder, _being_sent(name, target):
        path = Path(folder, "package.yaml")
        package.save_package(documents, path)
        registered = _upload(client, target, path, documents) if options.upload else None
        if options.schedule:
            made = sending.schedule(
                client, target, path, values, name, options.schedule, registered
            )
            return _shown(Outcome("submitted", made, where=cluster.schedule_link(target, made)))
        if registered and not (options.run or options.wait):
            where = f"{target.ui}/#/pipelines/details/{registered.pipeline_id}"
            place = f"{where}/version/{registered.version_id}"
            return _shown(Outcome("submitted", "", where=place))
        run_id = sending.submit_once(client, target, path, values, name, registered, again=True)
    return _follow(options, client, target, run_id, values)


def name_of(given: str | None, values: Mapping[str, Any]) -> str:
    """The name of a run; one that no other run has where nobody named it.

    Raises:
        ConfigError: it is longer than Kubeflow's database takes, or has a variable of Argo's in it,
            which gets the name with the workflow.
    """
    check_texts({"--run-name": given or ""})
    if given and len(given) > _LONGEST_NAME:
        raise ConfigError(
            f"the name of the run has {len(given)} characters; Kubeflow keeps {_LONGEST_NAME}",
            where="--run-name",
            fix="write a shorter one",
        )
    return (
        given or f"{values['publish_name']} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {uuid4().hex[:6]}"
    )


def _shown(outcome: Outcome) -> Outcome:
    print(outcome.where, file=sys.stderr, flush=True)
    return outcome


def _upload(
    client: Any, target: cluster.Endpoint, path: Path, documents: list[dict[str, Any]]
) -> sending.Registered:
    # the same content has the same name, so a second upload finds the first
    text = json.dumps(documents, sort_keys=True)
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = documents[0]["pipelineInfo"]["name"]
    registered = sending.upload(client, target, path, name, version)
    word = "registered" if registered.new else "was registered before"
    print(f"pipeline {name}, version {version}: {word}", file=sys.stderr)
    return registered


def _follow(
    options: argparse.Namespace,
    client: Any,
    target: cluster.Endpoint,
    run_id: str,
    values: Mapping[str, Any],
    earlier: EarlierEnd | None = None,
) -> Outcome:
    link = cluster.link(target, run_id)
    print(link, file=sys.stderr, flush=True)
    if not options.wait:
        return Outcome("submitted", run_id, where=link)
    try:
        return wait(
            client,
            target,
            run_id,
            store=str(values["publish_store"]),
            timeout_seconds=options.timeout_seconds,
            say=lambda text: print(text, file=sys.stderr, flush=True),
            earlier=earlier,
        )
    except KeyboardInterrupt:
        if not options.cancel_on_interrupt:
            raise KeyboardInterrupt(
                f"Stopped waiting; the run goes on: {link}\n`submit.py --cancel {run_id}` ends it.",
                run_id,
            ) from None
        try:
            cluster.cancel(client, target, run_id)
        except (KeyboardInterrupt, PipelineError) as problem:
            # a refusal is no sign that nothing was started: a token may have run out
            why = f"{problem.found}. " if isinstance(problem, PipelineError) else ""
            raise KeyboardInterrupt(
                f"Stopped; {why}Whether the run ends is not known: {link}\n"
                f"`submit.py --cancel {run_id}` asks again.",
                run_id,
            ) from None
        return Outcome("cancelled", run_id, where=link)


@contextmanager
def _being_sent(name: str, target: cluster.Endpoint) -> Iterator[None]:
    """Ctrl-C in here leaves open whether the endpoint has it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped while {name!r} was being sent: look for it at {target.ui}/#/runs before you "
            "send it again.",
            "",
        ) from None
