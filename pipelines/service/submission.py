"""What arrives at ``/trigger-finetune``: checked with the data step's own rules, then stored.

``check`` runs in a process of its own (``Checker``), so that a large body neither stops the service
from answering others nor brings it down.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpo.errors import DataError, DpoError
from dpo.storage.manifest import sha256_file
from dpo.storage.processes import die_with_parent
from dpo.storage.progress import FILE_VARIABLE
from dpo.storage.store import open_store
from pipelines.service.callbacks import CallbackRefused, check_url
from pipelines.service.settings import SOURCE, Settings

COMMUNITY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?", re.ASCII)
_KEYS = {"communityId", "dataset", "callbackUrl"}
_SHOWN = 100
_MOST_URL_CHARS = 2000


class Unacceptable(Exception):
    """A body that starts no run; made of plain values, so that it travels between processes.

    Args:
        status: HTTP status of the answer.
        detail: What was found.
        errors: ``(field, reason, message)`` of each field at fault.
    """

    def __init__(
        self, status: int, detail: str, errors: tuple[tuple[str, str, str], ...] = ()
    ) -> None:
        super().__init__(status, detail, errors)
        self.status, self.detail, self.errors = status, detail, errors


@dataclass(frozen=True)
class Dropped:
    """A row that is not used, and why."""

    row: int
    """From 0, as in ``dataset[row]``."""
    field: str
    reason: str
    message: str


@dataclass(frozen=True)
class Checked:
    """A data set that may be trained on."""

    community: str
    content: str
    """sha256 of the stored data set."""
    body: str
    """sha256 of all that was asked for."""
    data_url: str
    callback_url: str | None
    rows: int
    pairs: int
    dropped: int
    dropped_by_reason: dict[str, int]
    first_dropped: list[Dropped] = field(default_factory=list)


class Checker:
    """Runs ``check`` in another process, one body at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start_process, (os.getpid(),)
        )

    async def check(self, path: Path, communities: frozenset[str] | None) -> Checked:
        """See the function ``check``.

        Raises:
            Unacceptable: the body starts no run.
            DpoError: the store or the base model's tokenizer is not to be had.
        """
        loop = asyncio.get_running_loop()
        pool = self._pool
        try:
            found = await loop.run_in_executor(pool, _try_check, path, communities, self._settings)
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = self._new_pool()
            raise Unacceptable(503, "the check of the data set ended; try again") from None
        if isinstance(found, Unacceptable):
            raise found
        if isinstance(found, _Failure):
            raise found.kind(found.text)
        return found

    async def warm_up(self) -> None:
        """Start the process and load what every check needs."""
        await asyncio.get_running_loop().run_in_executor(self._pool, _load)

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _start_process(parent: int) -> None:
    die_with_parent(parent)
    # the stages' progress is not for the service's log
    os.environ[FILE_VARIABLE] = os.devnull


def _load() -> None:
    import dpo.data.stage  # noqa: F401


@dataclass(frozen=True)
class _Failure:
    """An error as a value: an exception with its context does not travel well."""

    kind: type[DpoError]
    text: str


def _try_check(
    path: Path, communities: frozenset[str] | None, settings: Settings
) -> Checked | Unacceptable | _Failure:
    """``check`` with its errors as values."""
    try:
        return check(path, communities, settings)
    except Unacceptable as error:
        return error
    except DpoError as error:
        return _Failure(type(error), str(error))
    except OSError as error:
        return _Failure(DpoError, f"the data set could not be written: {error.strerror}")


def check(path: Path, communities: frozenset[str] | None, settings: Settings) -> Checked:
    """Check a body and store its data set.

    Args:
        path: The body.
        communities: Those that the caller may act for; None stands for all.
        settings: Limits, store, and the settings of the runs.

    Raises:
        Unacceptable: the body starts no run.
        DpoError: the store or the base model's tokenizer is not to be had.
    """
    community, rows, callback = _read_body(path, communities, settings)
    with TemporaryDirectory(dir=path.parent) as folder:
        data = Path(folder, "data.jsonl")
        _write_rows(rows, data, settings)
        content = sha256_file(data)
        pairs, rejected = judge(data, settings)
        url = _keep(data, content, community, settings)
    return Checked(
        community=community,
        content=content,
        body=hashlib.sha256(f"{content}\0{callback or ''}".encode()).hexdigest(),
        data_url=url,
        callback_url=callback,
        rows=len(rows),
        pairs=pairs,
        dropped=len(rejected),
        dropped_by_reason=dict(Counter(item.reason for item in rejected).most_common()),
        first_dropped=rejected[:_SHOWN],
    )


def judge(data: Path, settings: Settings) -> tuple[int, list[Dropped]]:
    """What the data step makes of a file of rows: the number of pairs, and what it drops.

    This is all that the service needs of ``dpo.data``: the step itself, with a run's settings.

    Raises:
        Unacceptable: the step refuses the data set; with the rows at fault.
        DpoError: the base model's tokenizer is not to be had.
    """
    from dpo.data.quarantine import QUARANTINE
    from dpo.data.stage import run_ingest

    config = settings.ingest_config
    source = config.sources[SOURCE].model_copy(update={"path": str(data)})
    config = config.model_copy(update={"sources": {SOURCE: source}})
    output = data.with_name("pairs")
    try:
        manifest = run_ingest(config, output)
    except DataError as error:
        kept = output.with_name(f"{output.name}.{QUARANTINE}")
        rejected = list(_quarantined(kept)) if kept.is_file() else []
        errors = tuple(_as_error(item) for item in rejected[:_SHOWN])
        detail = error.found.partition("\n")[0].removesuffix(" The first:")
        raise Unacceptable(422, detail, errors or (("dataset", "unusable", detail),)) from None
    return int(manifest.details["metrics"]["pairs"]), list(_quarantined(output / QUARANTINE))


def _quarantined(path: Path) -> Iterator[Dropped]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            item = json.loads(line)
            # the line of our file is the row's number; a held-out prompt has no line
            row = int(item["line"]) - 1
            yield Dropped(row, item["field"], item["reason"], item["advice"])


def _as_error(item: Dropped) -> tuple[str, str, str]:
    place = f"dataset[{item.row}]" if item.row >= 0 else "dataset"
    return (f"{place}.{item.field}" if item.field else place, item.reason, item.message)


def _keep(data: Path, content: str, community: str, settings: Settings) -> str:
    store = open_store(settings.community_store(community))
    key = f"data/{content}.jsonl"
    if store.stat(key) is None:
        store.upload(data, key, content)
    return store.url(key)


# --- the body ---


def _read_body(
    path: Path, communities: frozenset[str] | None, settings: Settings
) -> tuple[str, list[Any], str | None]:
    body = _parse(path)
    if not isinstance(body, dict):
        raise _wrong("", "wrong_type", "the body must be an object")
    if unknown := sorted(set(body) - _KEYS):
        raise _wrong(unknown[0], "unknown_field", f"the fields are {', '.join(sorted(_KEYS))}")
    community = _community(body)
    if communities is not None and community not in communities:
        raise Unacceptable(403, "these credentials are not for this community", (_NOT_YOURS,))
    rows = body.get("dataset")
    if not isinstance(rows, list):
        reason = "missing_field" if rows is None else "wrong_type"
        raise _wrong("dataset", reason, "dataset must be a list of {prompt, chosen, rejected}")
    if not rows:
        raise _wrong("dataset", "empty", "dataset is empty")
    if len(rows) > settings.max_rows:
        raise Unacceptable(
            413,
            f"the data set has {len(rows):,} rows; at most {settings.max_rows:,} are taken",
            (("dataset", "too_many_rows", f"at most {settings.max_rows:,} rows"),),
        )
    return community, rows, _callback(body, settings)


_NOT_YOURS = ("communityId", "forbidden", "use a token of this community")


def _parse(path: Path) -> Any:
    try:
        return json.loads(
            path.read_bytes(), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        detail = f"the body is not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        detail = f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except (ValueError, RecursionError) as error:
        found = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        detail = f"the body is not JSON that is taken: {found}"
    raise Unacceptable(400, detail)


def _unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        raise ValueError("an object holds a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _community(body: dict[str, Any]) -> str:
    community = body.get("communityId")
    if community is None:
        raise _wrong("communityId", "missing_field", "the field communityId is missing")
    if not isinstance(community, str):
        raise _wrong("communityId", "wrong_type", "communityId must be a text")
    if not COMMUNITY.fullmatch(community):
        raise _wrong(
            "communityId",
            "wrong_value",
            "communityId is 1 to 64 letters (a-z), digits, - and _, and begins and ends with a "
            "letter or digit",
        )
    return community


def _callback(body: dict[str, Any], settings: Settings) -> str | None:
    url = body.get("callbackUrl")
    if url is None:
        return None
    if not isinstance(url, str) or len(url) > _MOST_URL_CHARS:
        raise _wrong("callbackUrl", "wrong_type", "callbackUrl must be a URL")
    try:
        check_url(url, settings)
    except CallbackRefused as error:
        raise _wrong("callbackUrl", "refused", error.found) from None
    return url


def _write_rows(rows: list[Any], path: Path, settings: Settings) -> None:
    """One row a line, keys in order: equal rows are equal bytes."""
    too_long = []
    with path.open("wb") as file:
        for number, row in enumerate(rows):
            line = _line(row)
            if len(line) > settings.max_row_bytes:
                too_long.append(number)
            file.write(line + b"\n")
    if too_long:
        message = f"a row may have {settings.max_row_bytes:,} bytes"
        raise Unacceptable(
            413,
            f"{len(too_long):,} rows are too long: {message}",
            tuple((f"dataset[{n}]", "row_too_long", message) for n in too_long[:_SHOWN]),
        )


def _line(row: Any) -> bytes:
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # half a character: kept as it was written, for the data step to name it
        return json.dumps(row, sort_keys=True).encode()


def _wrong(name: str, reason: str, message: str) -> Unacceptable:
    return Unacceptable(422, message, ((name, reason, message),))
