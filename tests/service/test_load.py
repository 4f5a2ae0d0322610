"""Fifty clients with a thousand rows each, at once; and the same with the service killed meanwhile.

Prints what it measured; `make test-long PYTEST='-k load -s'` shows it.
"""

import http.client
import json
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.support import ServiceProcess

CLIENTS = 50
ROWS = 1000
OPTIONS = ("--no-worker",)
VARIABLES = {"DPO_SERVICE_REQUESTS_A_MINUTE": "1000000"}

pytestmark = pytest.mark.long


def big_body(number):
    """A thousand pairs that no other client has."""
    rows = [
        {
            "prompt": f"\n\nHuman: Question {n} of client {number}?\n\nAssistant:",
            "chosen": f" Gladly! The answer to {n} is a good one. " + "It goes on. " * 10,
            "rejected": f" No. Look for {n} yourself. " + "It goes on. " * 10,
        }
        for n in range(ROWS)
    ]
    return json.dumps({"communityId": f"client-{number}", "dataset": rows}).encode()


def p99(values):
    return sorted(values)[int(len(values) * 0.99)]


def memory_mib(process_id):
    """Highest resident memory of a process and of its children."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        own = re.search(rf"^(Pid|PPid):\t{process_id}$", text, re.MULTILINE)
        if own and (peak := re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)):
            total += int(peak[1])
    return total / 1024


def test_health_answers_while_fifty_clients_post(tmp_path):
    service = ServiceProcess(tmp_path / "data", *OPTIONS, **VARIABLES)
    client = service.start()
    bodies = [big_body(number) for number in range(CLIENTS)]
    over = threading.Event()
    times = []

    def ask():
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        while not over.is_set():
            start = time.perf_counter()
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            times.append(time.perf_counter() - start)
            time.sleep(0.02)
        connection.close()

    asking = threading.Thread(target=ask)
    asking.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client.post, bodies))
    seconds = time.perf_counter() - start
    over.set()
    asking.join()
    peak = memory_mib(service._process.pid)
    service.end(signal.SIGTERM)
    print(
        f"\n{CLIENTS} posts of {ROWS} rows ({len(bodies[0]) / 2**10:.0f} KiB) in {seconds:.1f} s; "
        f"/health p99 {p99(times) * 1000:.1f} ms, worst {max(times) * 1000:.1f} ms "
        f"({len(times)} requests); peak memory {peak:.0f} MiB"
    )
    assert [answer.status for answer in answers] == [202] * CLIENTS
    assert len({answer.json["runId"] for answer in answers}) == CLIENTS
    # the aim is 50 ms on a machine that does nothing else; this bound holds on a busy one
    assert p99(times) < 1.0
    assert peak < 1500


def test_no_request_is_lost_or_doubled_under_load_when_the_service_is_killed(tmp_path):
    service = ServiceProcess(tmp_path / "data", *OPTIONS, **VARIABLES)
    client = service.start()
    bodies = [big_body(number) for number in range(CLIENTS)]
    accepted = {}
    enough = threading.Event()

    def post(number):
        try:
            answer = client.post(bodies[number], Idempotency_Key="once")
        except (OSError, http.client.HTTPException):
            return
        if answer.status == 202:
            accepted[number] = answer.json["runId"]
        if len(accepted) >= CLIENTS // 4:
            enough.set()

    with ThreadPoolExecutor(CLIENTS) as pool:
        for number in range(CLIENTS):
            pool.submit(post, number)
        assert enough.wait(120)
        service.end(signal.SIGKILL)
    assert CLIENTS // 4 <= len(accepted) < CLIENTS
    client = service.start()
    there = {run["communityId"]: run["runId"] for run in client.get("/runs?limit=200").json["runs"]}
    for number, run_id in accepted.items():
        assert there[f"client-{number}"] == run_id
    # each client asks again, as it must when it had no answer
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda b: client.post(b, Idempotency_Key="once"), bodies))
    runs = client.get("/runs?limit=200").json["runs"]
    service.end(signal.SIGTERM)
    assert {answer.status for answer in again} <= {200, 202}
    assert len(runs) == CLIENTS
    assert len({run["communityId"] for run in runs}) == CLIENTS
    for number, run_id in accepted.items():
        assert again[number].json["runId"] == run_id
    assert list((tmp_path / "data" / "incoming").iterdir()) == []
