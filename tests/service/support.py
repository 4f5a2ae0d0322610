"""The real service for tests: in a thread of the tests' process, or as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo.data.toy import toy_rows
from pipelines.service.app import create_app
from pipelines.service.server import Server
from pipelines.service.settings import Settings

TINY = {"preset": "toy"}
# a machine that is busy with a training run gives a test little time
_START_SECONDS = 180.0
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Answer:
    """What the service answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """Speaks to one service."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)
    app: Any = None
    """The application, where it is in this process."""

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {**self.headers, **given})
            answer = connection.getresponse()
            read = answer.read()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, names, read)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, **headers)

    def post(self, value: Any, **headers: str) -> Answer:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        kind = {"Content_Type": "application/json"} if "Content_Type" not in headers else {}
        return self.send("POST", "/trigger-finetune", body, **kind, **headers)

    def run(self, run_id: str) -> Any:
        return self.get(f"/runs/{run_id}").json

    def wait(self, run_id: str, seconds: float = 400.0, until: str | None = None) -> Any:
        """The run when it has ended, or when the step ``until`` has begun."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run = self.run(run_id)
            if run["state"] not in ("queued", "running"):
                return run
            if any(s["name"] == until and s["state"] != "waiting" for s in run["steps"]):
                return run
            time.sleep(0.25)
        raise TimeoutError(run)


def body(community: str = "acme", n_rows: int = 40, first: int = 0) -> dict[str, Any]:
    """A data set that the data step accepts."""
    return {"communityId": community, "dataset": toy_rows()[first : first + n_rows]}


@contextlib.contextmanager
def served(data_dir: Path, **settings: Any) -> Iterator[Client]:
    """A service without a worker, in a thread: runs are accepted and wait."""
    chosen = Settings(**{**TINY, "data_dir": data_dir, "port": 0, **settings})
    chosen.check()
    app = create_app(chosen)
    server = Server(app, chosen)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Client(port, app=app)
    finally:
        server.should_exit = True
        thread.join(20)


class ServiceProcess:
    """``python -m pipelines.service``, to be killed and started again."""

    def __init__(self, data_dir: Path, *options: str, **variables: str) -> None:
        self.data_dir = data_dir
        self.options = options
        self.variables = variables
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, headers: dict[str, str] | None = None) -> Client:
        before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.service", "--port", "0", *self.options],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={
                    **os.environ,
                    "DPO_SERVICE_DATA_DIR": str(self.data_dir),
                    "DPO_SERVICE_PRESET": "toy",
                    "DPO_END_WITH": str(os.getpid()),
                    **self.variables,
                },
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            for line in self.log.read_bytes()[before:].splitlines():
                if b'"listening"' in line:
                    port = int(json.loads(line)["url"].rpartition(":")[2])
                    return Client(port, headers or {})
            time.sleep(0.05)
        self.end(signal.SIGKILL)
        raise RuntimeError(self.said())

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-3000:]

    def end(self, how: signal.Signals) -> int:
        assert self._process is not None
        self._process.send_signal(how)
        return self._process.wait(60)
