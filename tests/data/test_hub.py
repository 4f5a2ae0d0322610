"""Reading from the hub, whose HTTP interface a small server on loopback answers in its stead."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from dpo.storage.manifest import read_manifest
from tests.data.conftest import good_row, read_outcome

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "somebody/pairs"


def lines(numbers: range) -> bytes:
    return "".join(json.dumps(good_row(number)) + "\n" for number in numbers).encode()


FILES = {
    "README.md": b"# Pairs\n",
    "train.jsonl.gz": gzip.compress(lines(range(20)), mtime=0),
    "test.jsonl": lines(range(100, 105)),
    "notes.json": b'{"no": "pairs"}',
    "more.xlsx": b"PK",
    "other/train.jsonl": lines(range(200, 203)),
    "other/validation.jsonl": lines(range(300, 302)),
}


class _Hub(BaseHTTPRequestHandler):
    sent: ClassVar[set[str]] = set()
    """Files whose bytes were asked for."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if path in (f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith(f"/api/datasets/{NAME}/tree/{COMMIT}"):
            body = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in FILES.items()
                ]
            ).encode()
            headers["Content-Type"] = "application/json"
        else:
            name = path.removeprefix(f"/datasets/{NAME}/resolve/{COMMIT}/")
            if name not in FILES:
                self.send_error(404, "Repository not found")
                return
            body = FILES[name]
            if with_body:
                self.sent.add(name)
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ingest(hub: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``dpo ingest`` with the stand-in as its hub."""
    return run(hub, folder, "-m", "dpo", "ingest", "model=tiny", "output=out", *words)


def run(hub: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            **{"HF_ENDPOINT": hub, "HF_HOME": str(folder / "hub"), "NO_PROXY": "127.0.0.1"},
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_data_set_of_the_hub_with_its_own_splits(hub: str, tmp_path: Path) -> None:
    done = ingest(hub, tmp_path, f"datasets=[hf://{NAME}]")
    assert done.returncode == 0, done.stderr
    found = read_outcome(tmp_path / "out")
    by_split = {
        split: [pair["chosen"] for pair in found.pairs if pair["split"] == split]
        for split in ("train", "test")
    }
    assert by_split["train"] == [f"yes {n}" for n in (*range(200, 203), *range(20))]
    assert by_split["test"] == [f"yes {n}" for n in (*range(300, 302), *range(100, 105))]
    assert list(found.report["sources"].values()) == [f"hub:{NAME}@{COMMIT}"]
    assert f"files of another kind are not read: more.xlsx in {NAME}" in done.stderr
    assert f"files beside those of the set's rows are left out: notes.json in {NAME}" in done.stderr


def test_one_folder_of_it(hub: str, tmp_path: Path) -> None:
    done = ingest(hub, tmp_path, f"datasets=[hf://datasets/{NAME}/other]")
    assert done.returncode == 0, done.stderr
    chosen = [pair["chosen"] for pair in read_outcome(tmp_path / "out").pairs]
    assert sorted(chosen) == sorted(f"yes {n}" for n in (200, 201, 202, 300, 301))


def test_what_the_hub_does_not_have_is_one_message(hub: str, tmp_path: Path) -> None:
    done = ingest(hub, tmp_path, "datasets=[hf://somebody/else]")
    assert done.returncode == 1
    assert "the data set somebody/else cannot be had from the hub" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


SHARD = """
import sys
from pathlib import Path
from dpo.config.compose import compose
from dpo.config.stages import restrict
from dpo.data.shards import parse_shard, run_shard
from dpo.data.stage import run_ingest

config = restrict(compose(["model=tiny", sys.argv[1]]).config, "ingest")
if sys.argv[2:] == ["merge"]:
    run_ingest(config, Path("merged"), shards=[Path("1"), Path("2")])
else:
    run_shard(config, Path(sys.argv[2]), parse_shard(sys.argv[2] + "/2"))
"""


def test_a_shard_fetches_its_own_files_alone(hub: str, tmp_path: Path) -> None:
    """In the order of their names, every second one."""
    source = f"datasets=[hf://{NAME}]"
    sent = []
    for words in (["1"], ["2"], ["merge"]):
        _Hub.sent.clear()
        # a machine of its own has nothing in its cache
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        done = run(hub, tmp_path, "-c", SHARD, source, *words)
        assert done.returncode == 0, done.stderr
        sent.append(set(_Hub.sent))
    assert sent == [
        {"other/train.jsonl", "test.jsonl"},
        {"other/validation.jsonl", "train.jsonl.gz"},
        set(),
    ]
    assert ingest(hub, tmp_path, source).returncode == 0
    merged, one = (read_manifest(tmp_path / name, stage="ingest") for name in ("merged", "out"))
    assert merged.content_hash == one.content_hash
