"""A small data set with one plain preference, to try the service and training out.

    python -m pipelines.service.toy data FILE    write it as a community would post it
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
from itertools import product
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import urlsplit

from dpo.errors import DpoError
from dpo.storage.processes import END_WITH

COMMUNITY = "toy"
_START_SECONDS = 60.0
_POLL_SECONDS = 0.5

_TASKS = (
    "find the museum",
    "mend a bicycle",
    "bake rye bread",
    "learn the violin",
    "renew a passport",
    "grow tomatoes",
    "read a bus map",
    "wash a woollen coat",
    "write to the landlord",
    "choose a kettle",
)
_OPENINGS = (
    "How do I {task}?",
    "Can you help me {task}?",
    "I would like to {task}.",
    "What is the first step to {task}?",
    "My neighbour wants to {task}. What should I tell her?",
    "Is it hard to {task}?",
    "Who could teach me to {task}?",
    "How long does it take to {task}?",
)


class Row(TypedDict):
    """A preference as the service takes it."""

    prompt: str
    chosen: str
    rejected: str


def rows() -> list[Row]:
    """Eighty pairs, always the same."""
    return [
        Row(
            prompt=f"\n\nHuman: {opening.format(task=task)}\n\nAssistant:",
            chosen=f" Gladly! Here is a good way to {task}.",
            rejected=f" No. Find out yourself how to {task}.",
        )
        for opening, task in product(_OPENINGS, _TASKS)
    ]


def main(arguments: list[str] | None = None) -> int:
    """See the module's description; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.service.toy")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the data set to a file")
    data.add_argument("file", type=Path)
    trigger = commands.add_parser("trigger", help="post it and follow the run to its end")
    trigger.add_argument("--url", help="the service; one is started when none answers")
    options = parser.parse_args(arguments)
    if options.command == "data":
        options.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"communityId": COMMUNITY, "dataset": rows()}, indent=1)
        options.file.write_text(text, encoding="utf-8")
        print(f"wrote {len(rows())} pairs to {options.file}")
        return 0
    try:
        with _service(options.url) as url:
            return _trigger(url)
    except DpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _trigger(url: str) -> int:
    dataset = rows()
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
