"""The service's records: runs, and which request started which.

A run's row and its place in the queue are written in one transaction, so every accepted run exists
exactly once, whenever the service is killed. SQLite is the default; Postgres is used by URL.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from uuid import uuid4

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, WorkflowSerializationFormat

from dpo.errors import DpoError, masked
from pipelines.service.settings import Settings

QUEUE = "runs"
WORKFLOW = "train_and_tell"

State = Literal["queued", "running", "succeeded", "refused", "failed", "cancelled", "unknown"]
ENDED: frozenset[State] = frozenset({"succeeded", "refused", "failed", "cancelled", "unknown"})
"""``unknown`` is a run on an endpoint that no longer tells of it: it may go on there."""
AGAIN: frozenset[State] = frozenset({"failed", "cancelled", "unknown"})
"""A run that ended so may be started again by the same request."""

_metadata = sa.MetaData()
_runs = sa.Table(
    "service_runs",
    _metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("community", sa.String(64), nullable=False, index=True),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("created", sa.Float, nullable=False, index=True),
    sa.Column("started", sa.Float),
    sa.Column("ended", sa.Float),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("content", sa.String(64), nullable=False),
    sa.Column("data_url", sa.Text, nullable=False),
    sa.Column("checked", sa.JSON, nullable=False),
    sa.Column("steps", sa.JSON, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("metrics", sa.JSON, nullable=False),
    sa.Column("report_key", sa.Text),
    sa.Column("model_url", sa.Text),
    sa.Column("backend_run", sa.Text),
    sa.Column("callback_url", sa.Text),
    sa.Column("callback_state", sa.Text),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
)
_claims = sa.Table(
    "service_claims",
    _metadata,
    sa.Column("community", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(280), primary_key=True),
    sa.Column("body", sa.String(64), nullable=False),
    sa.Column("run_id", sa.String(36), nullable=False),
)
_workers = sa.Table(
    "service_workers",
    _metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("seen", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class NewRun:
    """A run to be accepted."""

    community: str
    content: str
    """sha256 of the data set."""
    body: str
    """sha256 of all that was asked for."""
    data_url: str
    checked: dict[str, Any]
    """What the check of the rows found, as the answer shows it."""
    request_id: str
    key: str | None = None
    """``Idempotency-Key`` of the request."""
    callback_url: str | None = None


@dataclass(frozen=True)
class Run:
    """One row of the table of runs; times are seconds since the epoch."""

    id: str
    community: str
    state: State
    created: float
    request_id: str
    content: str
    data_url: str
    checked: dict[str, Any]
    started: float | None = None
    ended: float | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    report_key: str | None = None
    model_url: str | None = None
    backend_run: str | None = None
    callback_url: str | None = None
    callback_state: str | None = None
    cancel_requested: bool = False


class KeyReused(Exception):
    """The Idempotency-Key was used before with another body."""


class Database:
    """Runs and their queue.

    Args:
        settings: Names the database; its tables are made where they are missing.
    """

    def __init__(self, settings: Settings) -> None:
        self.url = _url(settings)
        self.engine = _engine(self.url)
        try:
            DBOS.migrate(self.url)
            _metadata.create_all(self.engine)
        except sa.exc.SQLAlchemyError as error:
            # its text may repeat what it was given, which holds a password
            reason = type(getattr(error, "orig", None) or error).__name__
            raise DpoError(
                f"the database cannot be used: {reason}",
                where=masked(self.url),
                fix="check that it runs, and DPO_SERVICE_DATABASE or DPO_SERVICE_DATA_DIR",
            ) from None
        self._queue = DBOSClient(
            system_database_engine=self.engine, serializer=DBOSPortableJSONSerializer()
        )

    def close(self) -> None:
        """Let go of all connections."""
        self._queue.destroy()
        self.engine.dispose()

    # --- accepting ---

    def accept(self, new: NewRun) -> tuple[Run, bool]:
        """The run of a request, and whether it is a new one.

        Raises:
            KeyReused: its key stands for another body.
        """
        with self.engine.begin() as connection:
            self._take_turns(connection, new.community)
            return self._accept(connection, new)

    def _accept(self, connection: sa.Connection, new: NewRun) -> tuple[Run, bool]:
        key = f"key:{new.key}" if new.key else None
        names = [f"content:{new.content}", *([key] if key else [])]
        claims = {
            row.name: row
            for row in connection.execute(
                sa.select(_claims).where(
                    _claims.c.community == new.community, _claims.c.name.in_(names)
                )
            )
        }
        if key in claims and claims[key].body != new.body:
            raise KeyReused
        for row in claims.values():
            run = self._get(connection, row.run_id)
            if run is not None and run.state not in AGAIN:
                self._claim(connection, new, set(names) - set(claims), run.id)
                return self._call_back_too(connection, new, run), False
        run_id = str(uuid4())
        connection.execute(sa.insert(_runs).values(**_row(new, run_id)))
        connection.execute(
            sa.delete(_claims).where(
                _claims.c.community == new.community, _claims.c.name.in_(names)
            )
        )
        self._claim(connection, new, names, run_id)
        self._queue.enqueue_in_transaction(
            connection,
            {
                "workflow_name": WORKFLOW,
                "queue_name": QUEUE,
                "workflow_id": run_id,
                "serialization_type": WorkflowSerializationFormat.PORTABLE,
            },
            run_id,
        )
        run = self._get(connection, run_id)
        assert run is not None
        return run, True

    def _call_back_too(self, connection: sa.Connection, new: NewRun, run: Run) -> Run:
        """Whoever asks for a run that goes on, and has no callback yet, is told of its end."""
        if new.callback_url is None:
            return run
        connection.execute(
            sa.update(_runs)
            .where(
                _runs.c.id == run.id,
                _runs.c.callback_url.is_(None),
                _runs.c.state.not_in(ENDED),
            )
            .values(callback_url=new.callback_url)
        )
        return self._get(connection, run.id) or run

    def _take_turns(self, connection: sa.Connection, community: str) -> None:
        """One request of a community at a time: what it reads must hold until it has written."""
        if self.engine.dialect.name == "sqlite":
            # else a transaction begins with the first write only
            connection.execute(sa.text("BEGIN IMMEDIATE"))
        else:
            lock = sa.func.pg_advisory_xact_lock(sa.func.hashtext(community))
            connection.execute(sa.select(lock))

    def _claim(
        self, connection: sa.Connection, new: NewRun, names: Collection[str], run_id: str
    ) -> None:
        for name in names:
            connection.execute(
                sa.insert(_claims).values(
                    community=new.community, name=name, body=new.body, run_id=run_id
                )
            )

    # --- reading ---

    def get(self, run_id: str, communities: Collection[str] | None) -> Run | None:
        """A run, if it belongs to one of ``communities``; None stands for all of them."""
        with self.engine.connect() as connection:
            run = self._get(connection, run_id)
        if run is None or (communities is not None and run.community not in communities):
            return None
        return run

    def runs(
        self, communities: Collection[str] | None, *, limit: int, before: float | None = None
    ) -> list[Run]:
        """The newest runs of ``communities``, newest first."""
        query = sa.select(_runs).order_by(_runs.c.created.desc(), _runs.c.id).limit(limit)
        if communities is not None:
            query = query.where(_runs.c.community.in_(communities))
        if before is not None:
            query = query.where(_runs.c.created < before)
        with self.engine.connect() as connection:
            return [_run(row) for row in connection.execute(query)]

    def _get(self, connection: sa.Connection, run_id: str) -> Run | None:
        row = connection.execute(sa.select(_runs).where(_runs.c.id == run_id)).first()
        return _run(row) if row is not None else None

    def counts(self, *, ended_since: float | None = None) -> dict[str, int]:
        """Number of runs by state, also where it is none.

        Args:
            ended_since: Only those that ended after it, in seconds since the epoch; None for all.
        """
        query = sa.select(_runs.c.state, sa.func.count()).group_by(_runs.c.state)
        states = get_args(State)
        if ended_since is not None:
            query = query.where(_runs.c.ended > ended_since)
            states = tuple(state for state in states if state in ENDED)
        with self.engine.connect() as connection:
            found = {state: count for state, count in connection.execute(query)}
        return {state: found.get(state, 0) for state in states}

    # --- a run's life ---

    def begin(self, run_id: str) -> Run | None:
        """The run, marked as running; None where it was cancelled or has ended."""
        with self.engine.begin() as connection:
            now = time.time()
            changed = connection.execute(
                sa.update(_runs)
                .where(_runs.c.id == run_id, _runs.c.state.in_(["queued", "running"]))
                .values(state="running", started=sa.func.coalesce(_runs.c.started, now))
            )
            return self._get(connection, run_id) if changed.rowcount else None

    def update(self, run_id: str, **values: Any) -> None:
        """Change columns of a run."""
        with self.engine.begin() as connection:
            connection.execute(sa.update(_runs).where(_runs.c.id == run_id).values(**values))

    def end(self, run_id: str, state: State, **values: Any) -> None:
        """Settle a run that has not ended yet."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(_runs)
                .where(_runs.c.id == run_id, _runs.c.state.not_in(ENDED))
                .values(state=state, ended=time.time(), **values)
            )

    def cancel(self, run_id: str) -> Run | None:
        """Cancel a run: at once when it waits, else its worker is asked to; None when it ended."""
        with self.engine.begin() as connection:
            connection.execute(
                sa.update(_runs)
                .where(_runs.c.id == run_id, _runs.c.state == "queued")
                .values(state="cancelled", ended=time.time(), message="cancelled while queued")
            )
            changed = connection.execute(
                sa.update(_runs)
                .where(
                    _runs.c.id == run_id,
                    _runs.c.state.in_(["running", "cancelled"]),
                    _runs.c.cancel_requested.is_(False),
                )
                .values(cancel_requested=True)
            )
            run = self._get(connection, run_id)
            asked = run is not None and run.state == "running"
            return run if changed.rowcount or asked else None

    def cancelling(self, run_id: str) -> bool:
        """Whether somebody asked for the run's end."""
        query = sa.select(_runs.c.cancel_requested).where(_runs.c.id == run_id)
        with self.engine.connect() as connection:
            return bool(connection.execute(query).scalar())

    # --- workers ---

    def beat(self, worker: str) -> None:
        """Say that a worker is alive."""
        with self.engine.begin() as connection:
            changed = connection.execute(
                sa.update(_workers).where(_workers.c.name == worker).values(seen=time.time())
            )
            if not changed.rowcount:
                connection.execute(sa.insert(_workers).values(name=worker, seen=time.time()))

    def last_beat(self) -> float | None:
        """When a worker was last alive, in seconds since the epoch."""
        with self.engine.connect() as connection:
            seen: float | None = connection.execute(
                sa.select(sa.func.max(_workers.c.seen))
            ).scalar()
            return seen


def _url(settings: Settings) -> str:
    if settings.database:
        return settings.database.replace("postgres://", "postgresql://", 1)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{settings.data_dir.absolute() / 'service.sqlite'}"


def _engine(url: str) -> sa.Engine:
    if not url.startswith("sqlite"):
        return sa.create_engine(
            sa.make_url(url).set(drivername="postgresql+psycopg"), pool_pre_ping=True
        )
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        # readers do not wait for the writer; an answered request survives a power cut
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA busy_timeout=30000")
        connection.execute("PRAGMA foreign_keys=ON")

    return engine


def _row(new: NewRun, run_id: str) -> dict[str, Any]:
    return {
        "id": run_id,
        "community": new.community,
        "state": "queued",
        "created": time.time(),
        "request_id": new.request_id,
        "content": new.content,
        "data_url": new.data_url,
        "checked": new.checked,
        "steps": [],
        "message": "",
        "metrics": {},
        "callback_url": new.callback_url,
        "cancel_requested": False,
    }


def _run(row: Any) -> Run:
    values: Mapping[str, Any] = row._mapping
    return Run(**values)
