"""Runs a package with kfp.local; started by ``pipelines.local`` with its output in a log file.

A process of its own because kfp prints much, ends a failed step in a traceback, and is stopped
best by ending its whole process group.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.storage.processes import END_WITH, die_with_parent

ENDED_WITH = "the step's process ended with exit code "


def main(job_file: str, parent: int) -> int:
    """Run the job described in ``job_file`` for a process; 0 when the pipeline succeeded."""
    die_with_parent(parent)
    os.environ[END_WITH] = str(os.getpid())
    steps = _Steps()
    signal.signal(signal.SIGTERM, steps.tell)
    job: dict[str, Any] = json.loads(Path(job_file).read_text(encoding="utf-8"))
    from kfp import components, local

    local.init(
        runner=_runner(local, job, steps),
        pipeline_root=job["pipeline_root"],
        # kfp deletes this folder after the run
        workspace_root=tempfile.mkdtemp(prefix="kfp-workspace-"),
        enable_caching=True,
        cache_root=job["cache_root"],
    )
    _keep_outputs_in_loops()
    _name_run(job["run_id"])
    pipeline = components.load_component_from_file(job["package"])
    try:
        pipeline(**job["arguments"])
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _Steps:
    """What SIGTERM does to the run: it goes to the whole group, so to the step that runs, too.

    A training step writes its checkpoint first, and the run ends with it. Between two steps nothing
    else would end the run: the next one has not been told.
    """

    def __init__(self) -> None:
        self._told = False
        self._running: list[None] = []

    def tell(self, *_: object) -> None:
        """The handler of the signal."""
        self._told = True
        if not self._running:
            raise SystemExit(1)

    def watched(self, run: Callable[..., int]) -> Callable[..., int]:
        """``run``, which carries out a step and returns its exit code; not 0 after the signal."""

        def run_one(*given: Any, **settings: Any) -> int:
            self._running.append(None)
            try:
                code = run(*given, **settings)
            finally:
                self._running.pop()
            if code and not self._told:
                # for whoever reads the log of a step that left no message
                print(f"{ENDED_WITH}{code}", flush=True)
            return code or int(self._told)

        return run_one


def _keep_outputs_in_loops() -> None:
    """Let tasks in a loop read the outputs of tasks outside of it.

    kfp.local 2.17 puts the loop's item in place of every parameter that is the output of a task,
    not only in place of the item itself. Kubeflow does not.
    """
    from kfp.local.orchestrator import task_spec_utils

    replace_items = task_spec_utils.create_parameter_loop_iteration_task_spec

    def keep_outputs(original: Any, item: Any, name: str) -> Any:
        made = replace_items(original, item, name)
        for key, source in original.inputs.parameters.items():
            if source.HasField("task_output_parameter"):
                made.inputs.parameters[key].CopyFrom(source)
        return made

    task_spec_utils.create_parameter_loop_iteration_task_spec = keep_outputs


def _name_run(run_id: str) -> None:
    """Let steps see the id that the user is told, so that a run in a shared store is found by it.

    kfp.local 2.17 takes eight random digits instead. No part of a cache key: only steps that are
    never cached read it.
    """
    from kfp.local.orchestrator import dag_orchestrator, enhanced_dag_orchestrator

    def named(run: Any) -> Any:
        return lambda **arguments: run(**{**arguments, "unique_pipeline_id": run_id})

    dag_orchestrator.run_dag = named(dag_orchestrator.run_dag)
    enhanced_dag_orchestrator.run_enhanced_dag = named(enhanced_dag_orchestrator.run_enhanced_dag)


def _runner(local: Any, job: dict[str, Any], steps: _Steps) -> Any:
    if job["runner"] == "processes":
        from kfp.local import subprocess_task_handler

        run_process = subprocess_task_handler.run_local_subprocess
        subprocess_task_handler.run_local_subprocess = steps.watched(run_process)
        return local.SubprocessRunner(use_venv=False)
    # needs the package docker, which the images do not have
    from kfp.local import docker_task_handler

    from pipelines.containers import run_container

    docker_task_handler.run_docker_container = steps.watched(run_container)
    return local.DockerRunner(**job["docker"])


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
