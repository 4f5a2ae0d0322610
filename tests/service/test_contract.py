"""Requests made from the OpenAPI document, and bodies made to break the parser."""

import contextlib
import json
import re
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.service.settings import Settings
from pipelines.service.submission import Checked, Unacceptable, check
from tests.service.support import TINY, body, served

# a data set may have the right form and still be refused by the rules of the data step
NOT_SAID = "positive_data_acceptance"


@contextlib.contextmanager
def heard_of(client):
    """A worker says that it is alive, as /ready wants to hear; it carries out nothing."""
    over = threading.Event()
    database = client.app.state.service.database

    def beat():
        database.beat("test")
        while not over.wait(5):
            database.beat("test")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def schemathesis(tmp_path, examples):
    """Output of a run against a service; its last line says how many cases there were."""
    with (
        served(tmp_path / "data", requests_a_minute=10**7, max_body_bytes=100_000) as client,
        heard_of(client),
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", "--no-color"),
                f"http://127.0.0.1:{client.port}/openapi.json",
                *("--checks", "all", "--exclude-checks", NOT_SAID),
                *("--max-examples", str(examples), "--generation-deterministic"),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.findall(r"([\d,]+) generated", done.stdout)[-1].replace(",", ""))


def test_a_few_hundred_requests_of_the_document(tmp_path):
    assert schemathesis(tmp_path, 10) > 100


@pytest.mark.long
def test_five_thousand_requests_of_the_document(tmp_path):
    assert schemathesis(tmp_path, 1000) >= 5000


def test_the_documents_example_is_accepted(client):
    document = client.get("/openapi.json").json
    post = document["paths"]["/trigger-finetune"]["post"]
    sent = post["requestBody"]["content"]["application/json"]["schema"]["example"]
    assert client.post(sent).status == 202
    assert document["components"]["schemas"]["ProblemDocument"]["title"]


# --- the parser ---

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ROWS = st.lists(
    VALUES
    | st.fixed_dictionaries(
        {"prompt": VALUES, "chosen": VALUES, "rejected": VALUES},
        optional={"split": VALUES, "sft_target": VALUES},
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    found = Settings(**TINY, max_rows=200, max_row_bytes=10_000, data_dir=folder)
    # composed once, as in the service
    assert found.ingest_config
    return found


def outcome(chosen, sent):
    path = chosen.data_dir / "body.json"
    path.write_bytes(sent)
    try:
        return check(path, None, chosen)
    except Unacceptable as error:
        return error


def is_refused_in_order(found, chosen):
    # what travels between processes is plain values
    return (
        isinstance(found, Unacceptable)
        and found.status in (400, 413, 422)
        and str(chosen.data_dir) not in json.dumps(found.args)
    )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sent=st.binary(max_size=200))
@example(sent=b'{"communityId":"a","dataset":[{"prompt":"\\ud800","chosen":"b","rejected":"c"}]}')
@example(sent=b'\xef\xbb\xbf{"communityId":"a","dataset":[1]}')
@example(sent=b'{"communityId":"a","dataset":[1e999]}')
@example(sent=b'{"communityId":"a","dataset":["\\u0000"]}')
def test_any_bytes_are_refused_in_order(chosen, sent):
    assert is_refused_in_order(outcome(chosen, sent), chosen)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rows=ROWS)
def test_any_rows_among_good_ones_are_dropped_or_used(chosen, rows):
    good = body("acme", 80)["dataset"]
    sent = json.dumps({"communityId": "acme", "dataset": good + rows}).encode()
    found = outcome(chosen, sent)
    if isinstance(found, Checked):
        assert found.rows == 80 + len(rows)
        assert found.pairs + found.dropped == found.rows
    else:
        assert is_refused_in_order(found, chosen)
    assert [item.name for item in chosen.data_dir.iterdir() if item.name != "store"] == [
        "body.json"
    ]
