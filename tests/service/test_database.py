"""The records and their queue, on both databases: one run for each accepted request."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

import pipelines
from dpo.errors import DpoError
from pipelines.service import execution
from pipelines.service.database import Database, KeyReused, NewRun
from pipelines.service.settings import Settings
from tests.service.support import TINY


def postgres_binaries():
    found = shutil.which("postgres")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").is_file()), None)


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory):
    """A real server on loopback, ended with the tests."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no Postgres server was found (Debian: apt-get install postgresql)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # outside pytest's folder, which only its owner may enter: Postgres refuses to run as root
    folder = Path(f"/tmp/dpo-postgres-{port}")
    user = "postgres"
    folder.mkdir()
    run_as = None
    if os.getuid() == 0:
        shutil.chown(folder, user)
        run_as = user
    data = folder / "data"
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", user, "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        user=run_as,
    )
    log = (folder / "log").open("wb")
    options = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-F"]
    server = subprocess.Popen(
        [binaries / "postgres", *options], stdout=log, stderr=log, user=run_as
    )
    try:
        url = f"postgresql://{user}@127.0.0.1:{port}/postgres"
        engine = sa.create_engine(url.replace("://", "+psycopg://"))
        deadline = time.monotonic() + 30
        while True:
            try:
                engine.connect().close()
                break
            except sa.exc.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        engine.dispose()
        yield url
    finally:
        # a fast shutdown; SIGTERM would wait for every connection
        server.send_signal(signal.SIGINT)
        server.wait(60)
        log.close()
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request, tmp_path):
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else None
    found = Database(Settings(**TINY, data_dir=tmp_path, database=url))
    with found.engine.begin() as connection:
        for table in ("service_runs", "service_claims", "service_workers"):
            connection.execute(sa.text(f"DELETE FROM {table}"))
    yield found
    found.close()


def new(community="acme", content="c1", body="b1", key=None):
    return NewRun(community, content, body, "file:///x", {"rows": 1}, "request", key)


def queued(database):
    """Ids of the queue of DBOS, in its order."""
    return [status.workflow_id for status in database._queue.list_queued_workflows()]


def test_a_request_is_one_run_and_one_place_in_the_queue(database):
    before = set(queued(database))
    first, made = database.accept(new())
    again, made_again = database.accept(new(key="k"))
    assert (made, made_again, again.id) == (True, False, first.id)
    assert set(queued(database)) - before == {first.id}
    with pytest.raises(KeyReused):
        database.accept(new(content="c2", body="b2", key="k"))
    other, made = database.accept(new(community="umbrella", key="k"))
    assert made
    assert other.id != first.id


def test_fifty_at_once_make_one_run(database):
    before = set(queued(database))
    answers = []
    barrier = threading.Barrier(10)

    def ask(number):
        barrier.wait()
        for n in range(5):
            answers.append(database.accept(new(content=f"c{n}", body=f"b{n}", key=f"k{number}{n}")))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 50
    assert sum(made for _, made in answers) == 5
    ids = {run.id for run, _ in answers}
    assert len(ids) == 5
    assert set(queued(database)) - before == ids
    assert {state: count for state, count in database.counts().items() if count} == {"queued": 5}


def test_runs_are_counted_by_state_and_by_when_they_ended(database):
    """A state that no run is in any more is 0: a figure that is left out keeps its last value."""
    none = dict.fromkeys(
        ("queued", "running", "succeeded", "refused", "failed", "cancelled", "unknown"), 0
    )
    assert database.counts() == none
    runs = [database.accept(new(content=f"c{n}"))[0].id for n in range(3)]
    for run in runs[:2]:
        database.begin(run)
        database.end(run, "failed")
    database.update(runs[0], ended=time.time() - 7 * 3600)
    assert database.counts() == {**none, "failed": 2, "queued": 1}
    ended = {state: 0 for state in none if state not in ("queued", "running")}
    lately = database.counts(ended_since=time.time() - 6 * 3600)
    assert lately == {**ended, "failed": 1}


def test_a_run_goes_its_way_once(database):
    run, _ = database.accept(new())
    assert database.begin(run.id).state == "running"
    started = database.get(run.id, None).started
    # a worker that takes it up after a crash
    assert database.begin(run.id).started == started
    database.end(run.id, "succeeded", model_url="file:///m")
    database.end(run.id, "failed", message="too late")
    ended = database.get(run.id, None)
    assert (ended.state, ended.model_url, ended.message) == ("succeeded", "file:///m", "")
    assert database.begin(run.id) is None
    assert database.cancel(run.id) is None
    # what succeeded is not started again
    assert database.accept(new())[0].id == run.id


def test_a_run_begins_in_the_folder_of_the_service(tmp_path, monkeypatch):
    """Relative paths of its settings were looked for there before, and in the checkout after."""
    monkeypatch.chdir(tmp_path)
    begun = {}

    def begin(command, **given):
        begun.update(given, command=command)
        raise DpoError("enough")

    monkeypatch.setattr(execution.subprocess, "Popen", begin)
    with pytest.raises(DpoError, match="enough"):
        execution._here(None, {}, tmp_path, Settings(**TINY), None)
    monkeypatch.undo()
    assert "cwd" not in begun
    # nor does it find its code by the folder
    asked = [sys.executable, "-c", "import pipelines; print(pipelines.__file__)"]
    found = subprocess.run(
        asked, cwd=tmp_path, env=begun["env"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == pipelines.__file__


def test_what_failed_is_started_again(database):
    run, _ = database.accept(new(key="k"))
    database.begin(run.id)
    database.end(run.id, "failed")
    second, made = database.accept(new(key="k"))
    assert made
    assert second.id != run.id
    assert database.accept(new())[0].id == second.id


def test_cancelling_asks_the_worker_of_a_running_run(database):
    run, _ = database.accept(new())
    database.begin(run.id)
    assert not database.cancelling(run.id)
    assert database.cancel(run.id).state == "running"
    assert database.cancelling(run.id)
    # asking twice is no mistake
    assert database.cancel(run.id).cancel_requested


def test_runs_are_listed_newest_first_in_pages(database):
    ids = [database.accept(new(content=f"c{n}"))[0].id for n in range(5)]
    database.accept(new(community="umbrella"))
    first = database.runs(["acme"], limit=3)
    second = database.runs(["acme"], limit=3, before=first[-1].created)
    assert [run.id for run in [*first, *second]] == ids[::-1]
    assert len(database.runs(None, limit=10)) == 6
    assert database.runs([], limit=10) == []
    assert database.get(ids[0], ["umbrella"]) is None


def test_messages_to_a_community_name_no_place_of_this_machine(tmp_path, monkeypatch):
    """Seen: with a link in the path of the data folder its target was told, and URLs of it."""
    (tmp_path / "real place").mkdir()
    (tmp_path / "link").symlink_to("real place")
    monkeypatch.setenv("HOME", "/home/who")
    settings = Settings(data_dir=tmp_path / "link")
    message = (
        f"in {tmp_path / 'link'}/jobs/1, {settings.store_url}/a and {tmp_path}/real place. "
        f"/home/who/.cache/m, /home/whom, {Path.cwd()}/lr.py, {Path(execution.__file__)}"
    )
    assert execution._readable(message, settings) == (
        "in .../jobs/1, file://.../store/a and .... "
        ".../.cache/m, /home/whom, .../lr.py, .../pipelines/service/execution.py"
    )
