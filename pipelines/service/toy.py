"""Posts a small data set with one plain preference to the service, to try it out.

    python -m pipelines.service.toy trigger      post it to a service and follow the run to its end

The chosen answer of every pair is courteous and the rejected one is not, so even a tiny model
(preset ``toy``) learns to tell them apart in seconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dpo.data.toy import toy_rows
from dpo.errors import DpoError
from dpo.storage.processes import END_WITH

COMMUNITY = "toy"
_START_SECONDS = 60.0
_POLL_SECONDS = 0.5


def main(arguments: list[str] | None = None) -> int:
    """See the module's description; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.service.toy")
    commands = parser.add_subparsers(dest="command", required=True)
    trigger = commands.add_parser("trigger", help="post it and follow the run to its end")
    trigger.add_argument("--url", help="the service; one is started when none answers")
    options = parser.parse_args(arguments)
    try:
        with _service(options.url) as url:
            return _trigger(url)
    except DpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _trigger(url: str) -> int:
    dataset = toy_rows()
    # another order is another data set: each call starts a run of its own
    random.Random(time.time_ns()).shuffle(dataset)  # nosec B311
    run = _ask(url, "POST", "/trigger-finetune", {"communityId": COMMUNITY, "dataset": dataset})
    print(f"accepted: run {run['runId']}, {run['pairs']} pairs, {run['dropped']} rows dropped")
    shown: dict[str, str] = {}
    while run["state"] in ("queued", "running"):
        time.sleep(_POLL_SECONDS)
        run = _ask(url, "GET", run["statusUrl"])
        for step in run["steps"]:
            if step["state"] != shown.get(step["name"], "waiting"):
                shown[step["name"]] = step["state"]
                print(f"{step['name']:12} {step['state']}", flush=True)
    print(f"{run['state']} {run['message']}".rstrip())
    if run["modelUrl"]:
        print(f"published model: {run['modelUrl']}")
    return 0 if run["state"] == "succeeded" else 1


@contextmanager
def _service(url: str | None) -> Iterator[str]:
    """The service at ``url``; without one given, that of ``make api``, or one for this time."""
    default = "http://127.0.0.1:8000"
    if url or _answers(default):
        yield url or default
        return
    print("no service answers on port 8000: starting one for this run (preset toy)")
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("wb") as log:
        command = [sys.executable, "-m", "pipelines.service", "--preset", "toy", "--port", "0"]
        environment = {**os.environ, END_WITH: str(os.getpid())}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield _listening(process, Path(folder, "log"))
        finally:
            process.terminate()
            process.wait()


def _listening(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            if '"listening"' in line:
                url: str = json.loads(line)["url"]
                return url
        time.sleep(_POLL_SECONDS / 5)
    raise DpoError("the service did not start", where=log.read_text(encoding="utf-8")[-1000:])


def _answers(url: str) -> bool:
    try:
        _ask(url, "GET", "/health")
    except DpoError:
        return False
    return True


def _ask(url: str, method: str, path: str, value: Any = None) -> Any:
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or not parts.hostname:
        raise DpoError(f"{url} is not the address of a service", fix="write http://host:port")
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("DPO_SERVICE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=60)
    try:
        connection.request(method, path, json.dumps(value) if value else None, headers)
        answer = connection.getresponse()
        found = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem = f"the service does not answer: {type(error).__name__}"
        raise DpoError(problem, where=url, fix="start it with `make api`") from None
    finally:
        connection.close()
    if answer.status >= 400:
        raise DpoError(f"the service refused: {found.get('detail', answer.status)}", where=url)
    return found


if __name__ == "__main__":
    sys.exit(main())
