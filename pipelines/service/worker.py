"""The worker: takes runs from the queue in their order, at most so many at a time.

    python -m pipelines.service.worker

DBOS keeps the queue in the service's database. A run that was under way when the worker was killed
is taken up again by the next one; finished steps of its pipeline are not repeated.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from types import FrameType

from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer

from dpo.errors import DpoError
from dpo.storage.processes import END_WITH, end_with
from pipelines.local import locked
from pipelines.run import obtain_model
from pipelines.service import callbacks, execution
from pipelines.service.database import QUEUE, WORKFLOW, Database
from pipelines.service.logs import log, start_logging
from pipelines.service.settings import Settings

_NAME = "worker"
_BEAT_SECONDS = 5.0
_QUEUE_POLL_SECONDS = 0.5
_CALLBACK_TRIES = 5
_CALLBACK_WAIT_SECONDS = 2.0


class Worker:
    """Carries out runs until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings)
        self.stopping = threading.Event()

    def run(self) -> None:
        """Work until ``stopping`` is set."""
        execution.remove_leftovers(self.settings, self.database)
        config: DBOSConfig = {
            "name": "dpo-service",
            "system_database_engine": self.database.engine,
            "system_database_url": self.database.url,
            "serializer": DBOSPortableJSONSerializer(),
            # a new version of this code takes up the runs of the old one
            "application_version": "1",
            "executor_id": _NAME,
            "max_executor_threads": self.settings.max_runs + 4,
            "log_level": "WARNING",
        }
        DBOS(config=config)
        _register(self)
        DBOS.launch()
        DBOS.register_queue(
            QUEUE,
            global_concurrency=self.settings.max_runs,
            polling_interval_sec=_QUEUE_POLL_SECONDS,
            on_conflict="always_update",
        )
        log("worker started", max_runs=self.settings.max_runs)
        while not self.stopping.is_set():
            self.database.beat(_NAME)
            self.stopping.wait(_BEAT_SECONDS)

    def train(self, run_id: str) -> None:
        """Carry out a run, unless it was cancelled while it waited."""
        run = self.database.begin(run_id)
        if run is None:
            return
        log("run started", run_id=run_id, community=run.community, request_id=run.request_id)
        try:
            execution.carry_out(run, self.settings, self.database)
        except Exception as error:
            # a bug of ours ends this run, not the worker
            logging.getLogger("dpo.service").exception("run broke", extra={"run_id": run_id})
            self.database.end(run_id, "failed", message=f"internal error: {type(error).__name__}")
        ended = self.database.get(run_id, None)
        log("run ended", run_id=run_id, state=ended.state if ended else "unknown")

    def tell(self, run_id: str) -> None:
        """Call back whoever asked for it.

        Raises:
            CallbackFailed: so that DBOS tries again later.
        """
        run = self.database.get(run_id, None)
        if run is None or run.callback_url is None:
            return
        message = {
            "runId": run.id,
            "communityId": run.community,
            "state": run.state,
            "message": run.message,
            "modelUrl": run.model_url,
            "ended": run.ended,
        }
        try:
            callbacks.call(run.callback_url, message, self.settings)
        except callbacks.CallbackRefused as error:
            self.database.update(run_id, callback_state=f"refused: {error.found}")
            return
        except callbacks.CallbackFailed as error:
            self.database.update(run_id, callback_state=f"failed: {error.found}")
            raise
        self.database.update(run_id, callback_state="delivered")


def _register(worker: Worker) -> None:
    """The workflow behind every run: both parts are done once, also over restarts."""

    @DBOS.step(name="train")
    def train(run_id: str) -> None:
        worker.train(run_id)

    @DBOS.step(
        name="tell",
        retries_allowed=True,
        max_attempts=_CALLBACK_TRIES,
        interval_seconds=_CALLBACK_WAIT_SECONDS,
        backoff_rate=3.0,
    )
    def tell(run_id: str) -> None:
        worker.tell(run_id)

    @DBOS.workflow(name=WORKFLOW)
    def train_and_tell(run_id: str) -> None:
        train(run_id)
        try:
            tell(run_id)
        except Exception as error:
            log("callback gave up", run_id=run_id, error=type(error).__name__)


def main() -> int:
    """Run a worker with the settings of the environment; returns its exit code."""
    if parent := os.environ.get(END_WITH):
        end_with(int(parent))
    start_logging()
    try:
        settings = Settings.from_environment(os.environ)
        # two workers would carry out the same runs
        with locked(settings.data_dir.absolute() / "worker"):
            if not os.environ.get("KF_PIPELINES_ENDPOINT"):
                # on Kubeflow the steps fetch it themselves; a service's pod may reach no hub
                obtain_model(settings.run_parameters("file:///data.jsonl", "community"))
            worker = Worker(settings)

            def stop(_: int, __: FrameType | None) -> None:
                worker.stopping.set()

            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)
            worker.run()
    except DpoError as error:
        print(f"worker: {error}", file=sys.stderr)
        return error.exit_code
    # runs under way end with this process and are taken up by the next one
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
