"""``python -m pipelines.service``: the service, and beside it a worker.

Settings come from ``DPO_SERVICE_*`` variables; see ``--help`` for those that have options.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

from dpo.errors import ConfigError, DpoError
from dpo.storage.processes import END_WITH, end_with
from pipelines.service.app import create_app
from pipelines.service.logs import log, start_logging
from pipelines.service.server import Server
from pipelines.service.settings import PREFIX, Settings

_RESTART_SECONDS = 2.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    this = argparse.ArgumentParser(prog="python -m pipelines.service", description=__doc__)
    this.add_argument("--host", help=f"default: {PREFIX}HOST or 127.0.0.1")
    this.add_argument("--port", help=f"default: {PREFIX}PORT or 8000")
    this.add_argument("--data-dir", help="folder of database, default store and work")
    this.add_argument("--store", help="where data, reports and models go")
    this.add_argument("--preset", help="pipeline parameters to start from")
    this.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="a pipeline parameter or configuration key; may be repeated",
    )
    this.add_argument("--no-worker", action="store_true", help="a worker is started elsewhere")
    this.add_argument("--openapi", action="store_true", help="print the OpenAPI document and stop")
    return this


def main(arguments: list[str] | None = None) -> int:
    """Run the service until it is told to stop; returns its exit code."""
    options = parser().parse_args(arguments)
    if parent := os.environ.get(END_WITH):
        end_with(int(parent))
    try:
        settings = _settings(options)
        start_logging()
        app = create_app(settings)
    except DpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.openapi:
        print(json.dumps(app.openapi(), indent=1))
        return 0
    stopping = threading.Event()
    workers = threading.Thread(target=_keep_worker, args=(settings, stopping))
    if not options.no_worker:
        workers.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn ends in order on these, and then sends them once more to whoever was there before
        signal.signal(number, lambda *_: None)
    try:
        Server(app, settings).run()
    finally:
        stopping.set()
        if not options.no_worker:
            workers.join()
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {
        name: getattr(options, name) for name in ("host", "port", "data_dir", "store", "preset")
    }
    settings = Settings.from_environment(os.environ, **given)
    if not options.assignments:
        return settings
    assigned = dict(settings.settings)
    for text in options.assignments:
        name, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"{text!r} is not KEY=VALUE", fix="for example model=tiny")
        try:
            assigned[name] = json.loads(value)
        except ValueError:
            assigned[name] = value
    return Settings.from_environment(os.environ, **given, settings=assigned)


def _keep_worker(settings: Settings, stopping: threading.Event) -> None:
    """A worker beside the service, started again when it ends."""
    given = settings.model_dump(
        mode="json", include={"data_dir", "store", "preset", "settings", "host", "port"}
    )
    variables = {
        f"{PREFIX}{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in given.items()
        if value is not None
    }
    while not stopping.is_set():
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.service.worker"],
            env={**os.environ, **variables, END_WITH: str(os.getpid())},
        )
        while process.poll() is None:
            if stopping.wait(0.2):
                process.terminate()
                process.wait()
                return
        log("worker ended", exit_code=process.returncode)
        stopping.wait(_RESTART_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
