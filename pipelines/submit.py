"""Starts the pipeline: on this machine (``--local``) or on a Kubeflow Pipelines endpoint.

Exit codes: 0 success, 1 the run failed, 2 nothing was started (a mistake in the command or its
settings; a run, an endpoint, a store, data or a model that is not there), 3 the gate refused the
model, 4 the run was cancelled, 5 the waiting ended before the run (the time was over, or the
endpoint did not answer any more), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # a second of imports, with nothing begun that could be left behind
    def _end(*_: object) -> None:
        try:
            os.write(2, b"\nNothing was started.\n")
            # an option may be shortened: --out=json
            if any(re.fullmatch("(--o[a-z]*=)?json", word) for word in sys.argv[1:]):
                # whoever reads it reads one object, however this ends
                told = {"state": "interrupted", "message": "Nothing was started.", "run_id": ""}
                os.write(1, f"{json.dumps({**told, 'exit_code': 130})}\n".encode())
        finally:
            # also where that terminal is gone
            os._exit(130)

    _ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    _USUAL = {number: signal.getsignal(number) for number in _ENDING}
    for _number in (number for number, usual in _USUAL.items() if usual != signal.SIG_IGN):
        signal.signal(_number, _end)

if __package__ in (None, ""):
    # ``python pipelines/submit.py``: the checkout is what is run, wherever this is started
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    if find_spec("rich") is None:
        # the first package of others that is imported: this is not the Python of `make setup`
        print(
            f"the packages of this project are not installed for {sys.executable}\n"
            "  fix:   run `make setup`, then `. .venv/bin/activate`, and this command again",
            file=sys.stderr,
        )
        sys.exit(2)

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpo.config.arguments import Arguments
from dpo.errors import DpoError, PipelineError, print_any_text, system_problem
from dpo.plan.booked import check_booked
from dpo.storage.processes import told_to_end
from pipelines import asked, explain, history, package, start
from pipelines.deployment import image_assignments
from pipelines.deployment import names as deployments
from pipelines.local import Job
from pipelines.on_cluster import add_options, needs_a_store, run_on_cluster
from pipelines.outcome import Outcome, nothing_started, show
from pipelines.pods import booked
from pipelines.request import check_candidates, local_store, parameters, presets
from pipelines.run import (
    Where,
    obtain_model,
    package_for,
    planned,
    require_store,
    run_here,
    runs_folder,
)
from pipelines.sweep import parse_sweep

INTERRUPTED = 130
NOT_STARTED = 2
_MORE = """
`--list` prints the parameters. `explain [RUN_ID]` in the place of options says for each step of a
run why it was executed or cached.
"""
_OF_THIS_MACHINE = (
    "\nCompared with the runs of this machine: Kubeflow may have more of it in its cache."
)


def parser() -> Arguments:
    """The command line."""
    this = Arguments(
        prog="python pipelines/submit.py",
        description="Run the preference fine-tuning pipeline here or on Kubeflow Pipelines.",
        epilog=__doc__.partition("\n\n")[2] + _MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = this.add_argument_group("what to run")
    what.add_argument("--preset", choices=presets(), help="a shipped set of parameters")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="a pipeline parameter (preference_beta=0.2) or any configuration key (loss.beta=0.2, "
        "sft.lr=1e-5); may be repeated",
    )
    what.add_argument(
        "--store", type=asked.not_empty, help="where to publish: s3://, minio:// or file:// URL"
    )
    what.add_argument(
        "--rerun",
        type=asked.steps,
        default=[],
        metavar="STEP[,STEP]",
        help="run these steps although they are cached, and what follows",
    )
    what.add_argument(
        "--from",
        dest="start_from",
        type=asked.not_empty,
        metavar="RUN_ID",
        help="start from an earlier run: its parameters (so no --preset), and its pairs, SFT model "
        "and log-probabilities, but for steps that are named in --rerun or whose settings --set "
        "changes, and what follows them",
    )
    what.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V,V",
        help="train one policy for each value (loss.beta=0.05,0.1,0.5; preference_loss=dpo,ipo), "
        "take the best on a validation part of the held-out pairs, and send it through the gate on "
        "the rest; several make all combinations",
    )
    what.add_argument(
        "--ingest-shards",
        type=int,
        default=1,
        metavar="N",
        help="tasks that share the reading of the data, for sets that outgrow one machine; the "
        "result is that of one",
    )
    what.add_argument("--list", action="store_true", help="print all parameters and stop")
    where = this.add_argument_group("where")
    where.add_argument(
        "--local",
        nargs="?",
        const="processes",
        choices=["processes", "docker"],
        help="on this machine, in processes or in containers",
    )
    where.add_argument("--runs-dir", type=asked.place, help="folder of local runs (default: runs)")
    for name, meaning in (
        ("--endpoint", "Kubeflow Pipelines (default: KF_PIPELINES_ENDPOINT)"),
        (
            "--namespace",
            "profile, where the backend has several users (default: KF_PIPELINES_NAMESPACE)",
        ),
        ("--experiment", "default: KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"),
        ("--run-name", "name in the UI"),
    ):
        where.add_argument(name, type=asked.not_empty, help=meaning)
    where.add_argument(
        "--deployment",
        type=asked.not_empty,
        metavar="NAME|FILE",
        help=f"resources, nodes, secrets of the cluster: {', '.join(deployments())} or a YAML file",
    )
    where.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="train over N nodes (sft and preference start a TrainJob); short for nodes.count=N",
    )
    where.add_argument(
        "--deploy",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting of the deployment (train.gpus=2, images.data=NAME@sha256:...); "
        "may be repeated; reruns no finished step, but for images and model_cache",
    )
    where.add_argument(
        "--images", type=asked.place, metavar="FILE", help="JSON that `make images-push` wrote"
    )
    where.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="one image by fixed tag or digest: --image data=NAME --image train=NAME",
    )
    how = this.add_argument_group("how")
    how.add_argument(
        "--dry-run", action="store_true", help="say what would run and why; run nothing"
    )
    how.add_argument("--package", type=asked.place, help="with --dry-run: write the package here")
    how.add_argument(
        "--wait", action="store_true", help="wait for the end (always so with --local)"
    )
    how.add_argument(
        "--timeout-seconds",
        type=asked.seconds,
        metavar="N",
        help="with --wait: exit 5 when it takes longer",
    )
    how.add_argument(
        "--cancel-on-interrupt",
        action="store_true",
        help="Ctrl-C also cancels the run on the cluster",
    )
    how.add_argument(
        "--output",
        choices=["text", "json"],
        default="text",
        help="json: one object on stdout, for CI",
    )
    add_options(this)
    return this


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    print_any_text()
    as_json = any(map(_asks_for_json, given, [*given[1:], ""]))
    try:
        if given[:1] == ["explain"]:
            options = explain.parser().parse_args(given[1:])
            with nothing_started():
                return explain.main(options, runs_folder(options.runs_dir))
        # CI and `timeout` end a command with SIGTERM, a terminal with SIGHUP: as Ctrl-C
        with told_to_end():
            return _run(parser().parse_args(given))
    except (DpoError, OSError) as problem:
        error = system_problem(problem) if isinstance(problem, OSError) else problem
        print(error, file=sys.stderr)
        if as_json:
            state = "not started" if error.exit_code == NOT_STARTED else "failed"
            print(json.dumps({"state": state, "message": str(error), "exit_code": error.exit_code}))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        default = "Stopped. Finished steps are kept: the same command goes on from there."
        text, run_id = interrupt.args if len(interrupt.args) == 2 else (default, "")
        print(f"\n{text}", file=sys.stderr)
        if as_json:
            stopped = {"state": "interrupted", "message": text, "exit_code": INTERRUPTED}
            print(json.dumps({**stopped, "run_id": run_id}))
        return INTERRUPTED


def _asks_for_json(word: str, following: str) -> bool:
    """Whether an option is ``--output json``, which may be shortened as any other."""
    name, equals, value = word.partition("=")
    short = name.startswith("--o") and "--output".startswith(name)
    return short and (value if equals else following) == "json"


def _run(options: argparse.Namespace) -> int:
    with nothing_started():
        asked.check(options)
        documents = package.load_package()
        if options.list:
            return asked.list_parameters(documents, as_json=options.output == "json")
        runs = runs_folder(options.runs_dir)
        documents, values = _prepared(options, runs)
        if options.dry_run:
            return _dry_run(options, documents, values, runs)
    outcome = (
        run_here(
            Job(documents, values, runs, runner=options.local),
            Console(stderr=True),
            timeout_seconds=options.timeout_seconds,
        )
        if options.local
        else run_on_cluster(options, documents, values)
    )
    _finish(options, outcome)
    return outcome.exit_code


def _prepared(
    options: argparse.Namespace, runs: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The package and the parameters of the run that was asked for, checked."""
    _check_package_is_current()
    documents = _for_place(options)
    store = options.store or (local_store(runs) if options.local else None)
    package.set_uncached(documents, options.rerun)
    begin = start.beginning(
        package.defaults(documents),
        runs,
        run_id=options.start_from,
        rerun=options.rerun,
        local=bool(options.local),
        store=options.store,
        endpoint=(options.endpoint, options.namespace),
        preset_name=options.preset,
    )
    values = parameters(
        begin,
        preset_name=options.preset,
        assignments=options.assignments,
        store=store,
    )
    values, reasons = start.renewed(begin, values)
    for line in start.told(options.start_from, reasons):
        print(line, file=sys.stderr)
    check_candidates(values, parse_sweep(options.sweep))
    if needs_a_store(options):
        require_store(values)
        check_booked(values, booked(documents))
    if not options.local:
        package.keep_checkpoints(documents, str(values["publish_store"]))
    return documents, values


def _for_place(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The package for the place it will run in: with images and settings where those matter."""
    nodes = [] if options.nodes is None else [f"nodes.count={options.nodes}"]
    asked = bool(options.deployment or options.deploy or options.images or options.image or nodes)
    names_no_package = options.cancel or options.retry or (options.dry_run and not asked)
    where: Where = options.local or "cluster"
    return package_for(
        "processes" if names_no_package else where,
        deployment=options.deployment or "",
        assignments=[*options.deploy, *image_assignments(options.image), *nodes],
        images=options.images,
        store=options.store,
        sweep=options.sweep,
        n_shards=options.ingest_shards,
    )


def _check_package_is_current() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, "fresh.yaml")
        package.compile_pipeline(fresh)
        if fresh.read_bytes() != package.PACKAGE.read_bytes():
            raise PipelineError(
                "the compiled pipeline is not that of the sources beside it",
                where=package.PACKAGE.name,
                fix="run `make pipeline`",
            )


def _dry_run(
    options: argparse.Namespace,
    documents: list[dict[str, Any]],
    values: dict[str, Any],
    runs: Path,
) -> int:
    target = options.package or runs / "package.yaml"
    asked.write_package(documents, target)
    obtain_model(values)
    plan = planned(values, key_only=options.local != "docker")
    plan = history.with_candidates(plan, package.candidates_of(documents))
    expected = history.expectations(plan, runs / "history", options.rerun)
    if options.output == "json":
        steps = {e.step: {"runs": e.runs, "reason": e.reason} for e in expected}
        print(json.dumps({"package": str(target), "parameters": values, "steps": steps}))
        return 0
    table = Table(box=None)
    for heading in ("step", "", "why"):
        table.add_column(heading, overflow="fold")
    for item in expected:
        table.add_row(item.step, "runs" if item.runs else "cached", escape(item.reason))
    console = Console()
    console.print(table)
    if not options.local:
        console.print(_OF_THIS_MACHINE, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\npackage: {target}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _finish(options: argparse.Namespace, outcome: Outcome) -> None:
    if options.output == "json":
        print(outcome.as_json())
        return
    console = Console(stderr=outcome.state in ("failed", "timed out", "unknown"))
    beta = (outcome.evaluation.get("loss") or {}).get("beta")
    show(outcome, console, next_command=asked.next_command(options, outcome.state, beta))


if __name__ == "__main__":
    for _number, _usual in _USUAL.items():
        signal.signal(_number, _usual)
    sys.exit(main())
