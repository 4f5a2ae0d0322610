"""``POST /trigger-finetune``: what is accepted, what is dropped, what is refused and how."""

import http.client
import json
import socket
import time
from pathlib import Path

import pytest

from dpo.data.toy import toy_rows
from dpo.storage.store import open_store
from tests.service.support import body, served

HOSTILE_NAMES = (
    *("..", "../other", "a/../other", "/abs", "a/b", "a\\b", "a%2fb", "a\0b"),
    *(".hidden", "-a", "a-", " a", "acme\n", "a" * 65),
    # look like others, or become them when they are normalised
    *("\uff0e\uff0e/a", "\uff41cme", "acm\u0435", "ac\u200bme", "acme\u202e", "e\u0301a"),
)


def test_the_old_request_is_accepted(client):
    answer = client.post(body("old", 80))
    assert answer.status == 202
    run = answer.json
    assert answer.headers["location"] == run["statusUrl"] == f"/runs/{run['runId']}"
    assert (run["communityId"], run["state"], run["new"]) == ("old", "queued", True)
    assert (run["rows"], run["pairs"], run["dropped"]) == (80, 80, 0)
    assert client.run(run["runId"]) == {k: v for k, v in run.items() if k != "new"}


def test_dropped_rows_are_named_with_their_reasons(tmp_path):
    sent = body("acme", 80)
    sent["dataset"][3] = sent["dataset"][2]
    sent["dataset"][5] = {"prompt": "a", "chosen": "b"}
    sent["dataset"][7] = "no object"
    sent["dataset"][9] = {"prompt": "p", "chosen": " same", "rejected": "same "}
    with served(tmp_path / "data") as client:
        run = client.post(sent).json
    assert (run["rows"], run["pairs"], run["dropped"]) == (80, 76, 4)
    assert run["droppedByReason"] == {
        "duplicate_pair": 1,
        "missing_field": 1,
        "wrong_type": 1,
        "chosen_equals_rejected": 1,
    }
    found = {row["row"]: row for row in run["droppedRows"]}
    assert found[5] == {
        "row": 5,
        "field": "rejected",
        "reason": "missing_field",
        "message": "the field rejected is missing",
    }
    assert found[3]["reason"] == "duplicate_pair"
    assert "expected an object" in found[7]["message"]


def test_the_data_set_is_stored_under_its_content(tmp_path):
    with served(tmp_path / "data") as client:
        client.post(body("acme"))
        client.post(body("umbrella"))
    stored = sorted((tmp_path / "data" / "store" / "communities").glob("*/data/*.jsonl"))
    assert [path.parts[-3] for path in stored] == ["acme", "umbrella"]
    assert stored[0].name == stored[1].name
    rows = [json.loads(line) for line in stored[0].read_text().splitlines()]
    assert rows == toy_rows()[:40]
    assert list((tmp_path / "data" / "incoming").iterdir()) == []


@pytest.mark.minio
def test_the_store_may_be_a_bucket(tmp_path, bucket_url):
    open_store(bucket_url).check(create=True)
    with served(tmp_path / "data", store=f"{bucket_url}/prefix") as client:
        assert client.get("/ready").json["errors"][0]["field"] == "worker"
        assert client.post(body("acme")).status == 202
    keys = list(open_store(f"{bucket_url}/prefix").list())
    assert len(keys) == 1
    assert keys[0].startswith("communities/acme/data/")


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("sent", "status", "field", "reason"),
    [
        (b"", 400, None, None),
        (b"{", 400, None, None),
        (b"\xff\xfe", 400, None, None),
        (b"[" * 5000, 400, None, None),
        (b'{"communityId": NaN}', 400, None, None),
        (b'{"communityId": "a", "communityId": "b"}', 400, None, None),
        (b'{"communityId": ' + b"9" * 5000 + b"}", 400, None, None),
        ([], 422, "", "wrong_type"),
        ({}, 422, "communityId", "missing_field"),
        ({"communityId": 3}, 422, "communityId", "wrong_type"),
        ({"communityId": "acme"}, 422, "dataset", "missing_field"),
        ({"communityId": "acme", "dataset": {}}, 422, "dataset", "wrong_type"),
        ({"communityId": "acme", "dataset": []}, 422, "dataset", "empty"),
        ({"communityId": "acme", "dataset": [PAIR], "x": 1}, 422, "x", "unknown_field"),
        # half a character
        ({"\ud800": 1, "communityId": "acme", "dataset": []}, 422, "\ud800", "unknown_field"),
        *(
            ({"communityId": "acme", "dataset": [PAIR], name: value}, 422, name, "unknown_field")
            for name in ("data_uri", "sft_model_uri", "reference_uri", "datasets", "publish_store")
            for value in ("file:///etc/passwd", "http://169.254.169.254/latest/meta-data/")
        ),
        *(
            ({"communityId": name, "dataset": [PAIR]}, 422, "communityId", "wrong_value")
            for name in HOSTILE_NAMES
        ),
        ({"communityId": "acme", "dataset": [{}]}, 422, "dataset[0].prompt", "missing_field"),
        ({"communityId": "acme", "dataset": [PAIR]}, 422, "dataset", "unusable"),
    ],
)
def test_what_is_wrong_is_named(client, sent, status, field, reason):
    answer = client.post(sent)
    problem = answer.json
    assert answer.status == problem["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["detail"]
    if field is not None:
        assert (problem["errors"][0]["field"], problem["errors"][0]["reason"]) == (field, reason)


def test_too_many_bad_rows_are_refused_as_the_data_step_does(client):
    sent = body("acme", 40)
    for row in sent["dataset"][:3]:
        row["chosen"] = ""
    problem = client.post(sent).json
    # three of forty; the configuration allows 5 %
    assert problem["detail"].startswith("3 of 40 rows are unusable (7.5%; at most 5.0%")
    assert [error["field"] for error in problem["errors"]] == [
        "dataset[0].chosen",
        "dataset[1].chosen",
        "dataset[2].chosen",
    ]
    assert problem["errors"][0]["message"] == "chosen is empty"
    assert "/" not in problem["detail"]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "..",
            "../umbrella",
            "/etc",
            "a/b",
            "a\\b",
            "a\0",
            "a b",
            "-a",
            "a-",
            "a" * 65,
            "a\n",
        ),
        # a full-width solidus, a dotless i, a letter with a combining mark, right-to-left override
        *("a\uff0fb", "\u0131d", "e\u0301", "a\u202eb", "${x}", "{{7*7}}", "a'b", "%2e%2e"),
    ],
)
def test_names_that_could_mean_another_place_are_refused(client, name):
    answer = client.post(body(name))
    assert answer.status == 422
    assert answer.json["errors"][0]["field"] == "communityId"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_unknown_addresses_and_methods_are_problems_too(client, method):
    assert client.send(method, "/nowhere").json["status"] == 404
    answer = client.send(method, "/health")
    assert answer.status == 405
    assert "GET" in answer.headers["allow"]


# --- idempotency ---


def test_the_same_content_starts_one_run(client):
    first = client.post(body("twice"))
    again = client.post(json.dumps(body("twice"), indent=3).encode())
    assert (first.status, again.status) == (202, 200)
    assert again.json["runId"] == first.json["runId"]
    assert (first.json["new"], again.json["new"]) == (True, False)
    other = client.post(body("thrice"))
    assert other.json["runId"] != first.json["runId"]


def test_a_key_stands_for_one_body(client):
    first = client.post(body("keys", 40), Idempotency_Key="k1")
    assert client.post(body("keys", 40), Idempotency_Key="k1").json["runId"] == first.json["runId"]
    answer = client.post(body("keys", 41), Idempotency_Key="k1")
    assert answer.status == 422
    assert answer.json["errors"][0] == {
        "field": "Idempotency-Key",
        "reason": "reused",
        "message": "choose a new key",
    }
    # the same words of another community are another key
    assert client.post(body("others", 41), Idempotency_Key="k1").status == 202


def test_a_cancelled_run_can_be_started_again(client):
    first = client.post(body("again"), Idempotency_Key="k").json["runId"]
    cancelled = client.send("DELETE", f"/runs/{first}")
    assert (cancelled.status, cancelled.json["state"]) == (202, "cancelled")
    second = client.post(body("again"), Idempotency_Key="k")
    assert second.status == 202
    assert second.json["runId"] != first
    assert client.run(first)["state"] == "cancelled"


@pytest.mark.parametrize("key", ["", "k" * 256, "a\tb"])
def test_keys_have_a_form(client, key):
    assert client.post(body("keys"), Idempotency_Key=key).status == 422


# --- limits ---


def test_a_long_body_is_refused_before_it_is_read(client):
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.settimeout(10)
        connection.sendall(
            b"POST /trigger-finetune HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999999999\r\n\r\n"
        )
        assert b"413" in connection.recv(100)


def test_a_long_body_without_a_length_is_refused_while_it_arrives(client):
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.settimeout(10)
        connection.sendall(
            b"POST /trigger-finetune HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        # limit 200,000 bytes: it must not take 100 chunks of 10,000
        sent = 0
        connection.setblocking(True)
        try:
            for _ in range(100):
                connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                sent += 10_000
                time.sleep(0.002)
        except OSError:
            pass
        else:
            assert b"413" in connection.recv(100)
            return
        assert 200_000 <= sent < 1_000_000


def test_other_media_types_are_refused(client):
    assert client.post(body(), Content_Type="text/plain").status == 415


def test_rows_have_a_limit_in_number_and_size(tmp_path):
    with served(tmp_path / "data", max_rows=50, max_row_bytes=300) as client:
        answer = client.post(body(n_rows=51))
        assert answer.status == 413
        assert answer.json["errors"][0]["reason"] == "too_many_rows"
        sent = body(n_rows=40)
        sent["dataset"][7]["chosen"] = "long" * 100
        answer = client.post(sent)
        assert answer.status == 413
        assert answer.json["errors"][0]["field"] == "dataset[7]"
        assert client.post(body(n_rows=40)).status == 202


def test_requests_are_limited_but_probes_are_not(tmp_path):
    with served(tmp_path / "data", requests_a_minute=5) as client:
        statuses = [client.get("/runs").status for _ in range(7)]
        assert statuses == [200] * 5 + [429] * 2
        limited = client.get("/runs")
        # five a minute: the next one may come after twelve seconds
        assert 11 <= int(limited.headers["retry-after"]) <= 13
        assert limited.json["status"] == 429
        assert client.get("/health").status == 200


def test_slow_headers_and_slow_bodies_are_cut_off(tmp_path):
    with served(tmp_path / "data", header_seconds=0.3, body_seconds=0.3) as client:
        address = ("127.0.0.1", client.port)
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost")
            assert connection.recv(100) == b""
        with socket.create_connection(address, timeout=10) as connection:
            assert connection.recv(100) == b""
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(
                b"POST /trigger-finetune HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            assert b"408" in connection.recv(100)
        # a kept connection is not cut off between its requests
        kept = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"ok"}'
        socket_before = kept.sock
        time.sleep(0.6)
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"ok"}'
        assert kept.sock is socket_before
        kept.close()
    assert list(Path(tmp_path / "data" / "incoming").iterdir()) == []
