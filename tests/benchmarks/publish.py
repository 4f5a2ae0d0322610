"""Publishing beside plain parallel uploads of the same bytes, to one MinIO server.

    python -m tests.benchmarks.publish --gigabytes 5

Prints one JSON object a line: throughput of both in MB/s, and the peak memory of the publishing
process for the whole model and for a fifth of it. ``peer`` is four threads with ``fput_object`` of
the ``minio`` client, with its defaults and with parts as large as ours; ``ours`` reads, hashes,
sends with checksums, writes the manifest and points ``latest.json`` at it. Each runs in a process
of its own, in turn; the figures are medians. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from minio import Minio

from dpo.publish.version import publish_files
from dpo.storage.manifest import FileEntry, list_files
from dpo.storage.store import open_store
from tests.support.minio import running_server

BUCKET = "bench"
_THREADS = 4
_SHARD_BYTES = 1 << 30
_PIECE_BYTES = 8 << 20
_PART_BYTES = 16 << 20
_PEERS = ("client", "client, large parts")


def make_model(folder: Path, n_bytes: int) -> list[FileEntry]:
    """Shards of at most 1 GiB of random bytes."""
    folder.mkdir()
    source = random.Random(0)
    for number, start in enumerate(range(0, n_bytes, _SHARD_BYTES)):
        left = min(_SHARD_BYTES, n_bytes - start)
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            while left:
                left -= file.write(source.randbytes(min(left, _PIECE_BYTES)))
    return list_files(folder)


def with_client(folder: Path, files: list[FileEntry], part_bytes: int) -> None:
    """What one would write with the client alone; 0 takes its own size of parts."""
    client = Minio(
        urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc,
        os.environ["AWS_ACCESS_KEY_ID"],
        os.environ["AWS_SECRET_ACCESS_KEY"],
        secure=False,
    )
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [
            pool.submit(
                client.fput_object,
                BUCKET,
                f"plain/{entry.path}",
                str(folder / entry.path),
                part_size=part_bytes,
            )
            for entry in files
        ]:
            done.result()


def with_publish(folder: Path, files: list[FileEntry]) -> None:
    """What the publish step does, with the hashes of the checkpoint's manifest."""
    publish_files(open_store(f"s3://{BUCKET}"), folder, files, "policy")


def _only(what: str, folder: Path, files: list[FileEntry]) -> None:
    start = time.perf_counter()
    if what == "publish":
        with_publish(folder, files)
    else:
        with_client(folder, files, _PART_BYTES if what == "client, large parts" else 0)
    seconds = time.perf_counter() - start
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak_mib}))


def _measure(what: str, folder: Path, listing: Path) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--only", what, str(folder), str(listing)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    store = open_store(f"s3://{BUCKET}")
    for key in list(store.list()):
        store.delete(key)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _line(case: str, ours: float, peer: float, unit: str) -> None:
    figures = {"ours": round(ours, 1), "peer": round(peer, 1), "ratio": round(ours / peer, 3)}
    print(json.dumps({"benchmark": "publish", "case": case, **figures, "unit": unit}), flush=True)


def _write_listing(path: Path, files: list[FileEntry]) -> None:
    path.write_text(json.dumps([[e.path, e.size, e.sha256] for e in files]), encoding="utf-8")


def run(n_bytes: int, rounds: int, place: Path) -> None:
    """Measure both in turn and print the figures."""
    files = make_model(place / "model", n_bytes)
    small = make_model(place / "small", max(1, n_bytes // 5))
    _write_listing(place / "model.json", files)
    _write_listing(place / "small.json", small)
    with running_server(place / "minio") as server:
        os.environ.update(server.environment())
        open_store(f"s3://{BUCKET}").check(create=True)
        _measure("client", place / "small", place / "small.json")
        fifth = _measure("publish", place / "small", place / "small.json")
        found: dict[str, list[dict[str, float]]] = {what: [] for what in ("publish", *_PEERS)}
        for number in range(rounds):
            order = list(found)
            for what in order if number % 2 else order[::-1]:
                found[what].append(_measure(what, place / "model", place / "model.json"))
    speed = {
        what: n_bytes / 1e6 / statistics.median(one["seconds"] for one in ones)
        for what, ones in found.items()
    }
    peak = {what: max(one["peak_mib"] for one in ones) for what, ones in found.items()}
    gigabytes = f"{n_bytes / 1e9:g} GB"
    for peer in _PEERS:
        _line(f"throughput, {gigabytes}, {peer}", speed["publish"], speed[peer], "MB/s")
    _line(f"peak memory, {gigabytes}", peak["publish"], peak["client"], "MiB")
    _line(f"peak memory, {gigabytes} against a fifth", peak["publish"], fifth["peak_mib"], "MiB")


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to put model and server (3 x the size)")
    parser.add_argument("--only", nargs=3, metavar=("WHAT", "FOLDER", "LISTING"))
    options = parser.parse_args()
    if options.only:
        what, folder, listing = options.only
        entries = json.loads(Path(listing).read_text(encoding="utf-8"))
        _only(what, Path(folder), [FileEntry(*entry) for entry in entries])
        return
    with TemporaryDirectory(dir=options.folder) as place:
        run(int(options.gigabytes * 1e9), options.rounds, Path(place))


if __name__ == "__main__":
    main()
