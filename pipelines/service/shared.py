"""What the service's routes share."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from prometheus_client import Gauge

from pipelines.service.auth import Authenticator, Caller
from pipelines.service.database import Database
from pipelines.service.guards import Figures
from pipelines.service.settings import Settings
from pipelines.service.submission import Checker

_LATELY_SECONDS = 6 * 3600


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _ = settings.ingest_config
        self.database = Database(settings)
        self.authenticator = Authenticator(settings)
        self.figures = Figures()
        self.runs = Gauge("dpo_runs", "Runs by state", ["state"], registry=self.figures.registry)
        self.lately = Gauge(
            "dpo_runs_ended_lately",
            "Runs that ended within the last six hours, by state",
            ["state"],
            registry=self.figures.registry,
        )
        self.uploads = asyncio.Semaphore(settings.max_uploads)
        self.incoming = settings.data_dir.absolute() / "incoming"
        self._checker: Checker | None = None

    @property
    def checker(self) -> Checker:
        """Checks bodies in a process of its own, started when first needed."""
        if self._checker is None:
            self._checker = Checker(self.settings)
        return self._checker

    def count_runs(self) -> None:
        """Set the figures of runs; a state that no run is in any more is 0 again."""
        for state, count in self.database.counts().items():
            self.runs.labels(state).set(count)
        lately = self.database.counts(ended_since=time.time() - _LATELY_SECONDS)
        for state, count in lately.items():
            self.lately.labels(state).set(count)

    async def start(self) -> None:
        """Remove what a killed service left, and warm up."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        for left in self.incoming.iterdir():
            _remove(left)
        await self.checker.warm_up()

    def close(self) -> None:
        """Let go of everything."""
        if self._checker is not None:
            self._checker.close()
        self.database.close()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _caller(request: Request) -> Caller:
    service: Service = request.app.state.service
    return service.authenticator.caller(
        request.headers.get("authorization"), reading=request.method in ("GET", "HEAD")
    )


CallerOf = Annotated[Caller, Depends(_caller)]
