"""Jobs in a database: SQLite, or PostgreSQL by URL.

A job is held by the process that works on it for as long as that process says so, every few
seconds. When it falls silent, whoever asks for work next begins the job anew. Every change is one
conditional UPDATE, so that two processes never hold one job; their clocks must agree to a second or
so.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.schema import CreateTable

from mm_model.api import JobState, Problem, problem_of
from mm_model.errors import MMError, OverloadedError, ServiceError, StorageError

LEASE_S = 15.0
"""Silence after which a job's process is taken for dead."""
MAX_ATTEMPTS = 3
"""A job whose process ended so often is taken to be the reason."""

_TABLE = sa.Table(
    "mm_jobs",
    sa.MetaData(),
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("form", sa.Text, nullable=False),
    sa.Column("files", sa.Text, nullable=False),
    sa.Column("stored_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_s", sa.Float, nullable=False),
    sa.Column("began_s", sa.Float),
    sa.Column("done", sa.BigInteger, nullable=False),
    sa.Column("work", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("holder", sa.String(32), nullable=False),
    sa.Column("lease_until_s", sa.Float, nullable=False),
    sa.Column("expires_s", sa.Float),
    sa.Column("problem", sa.Text),
    sa.Column("result", sa.Text),
)
_C = _TABLE.c
_DISK_FULL = "53100"  # PostgreSQL's SQLSTATE
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class Job:
    """A row.

    Attributes:
        form: names and texts of the form's fields.
        stored_bytes: that it holds on disk; until it ends, the most that it may come to hold.
        files: names of the modalities that were sent, one a file, in the order of the form.
        began_s: when the present attempt began, seconds since 1970.
        done, work: windows that are computed, and all; 0 before it is known.
        attempt: number of the present attempt, from 1.
        problem: why it failed.
        result: file name, media type and headers of what it made.
    """

    id: str
    model: str
    owner: str
    state: JobState
    form: list[tuple[str, str]]
    files: list[str]
    stored_bytes: int
    created_s: float
    began_s: float | None
    done: int
    work: int
    attempt: int
    holder: str
    lease_until_s: float
    expires_s: float | None
    problem: Problem | None
    result: dict[str, Any] | None


class JobStore:
    """The jobs of one model.

    Args:
        url: of the database, as SQLAlchemy takes it.
        model: whose jobs these are.

    Raises:
        ServiceError: the database does not answer; so does every method.
        StorageError: it has no room; so does every method that changes something.
    """

    def __init__(self, url: str, model: str) -> None:
        self._model = model
        self._turns: dict[str, int] = {}
        self._count = itertools.count(1)
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=True)
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            raise _away(error) from error
        with self._connected() as connection:
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            connection.execute(CreateTable(_TABLE, if_not_exists=True))

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        """A transaction; what the database says of itself becomes an error of ours."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            if _is_full(error.orig):
                raise StorageError(
                    "there is no room in the jobs' database",
                    remedy="make room on its disk, then try again",
                ) from error
            raise _away(error) from error

    def close(self) -> None:
        self._engine.dispose()

    def check_room(
        self,
        owner: str,
        max_jobs: int,
        max_bytes: int,
        more_bytes: int = 0,
        more_jobs: int = 0,
    ) -> None:
        """Raise OverloadedError if an owner has too many unfinished jobs, or too much stored.

        Bytes and jobs that are on their way count as if they were here.
        """
        mine = (_C.model == self._model) & (_C.owner == owner)
        jobs = sa.select(sa.func.count()).where(mine & _C.state.in_(_UNFINISHED))
        stored = sa.select(sa.func.coalesce(sa.func.sum(_C.stored_bytes), 0)).where(mine)
        with self._connected() as connection:
            count = int(connection.scalar(jobs) or 0) + more_jobs
            total = int(connection.scalar(stored) or 0) + more_bytes
        if count >= max_jobs:
            raise OverloadedError(
                "too many jobs are unfinished",
                got=count,
                allowed=max_jobs,
                remedy="wait for one, or cancel it with DELETE",
            )
        if total > max_bytes:
            raise OverloadedError(
                "jobs hold too many bytes",
                got=total,
                allowed=max_bytes,
                remedy="delete jobs whose results you have",
            )

    def add(
        self,
        job_id: str,
        owner: str,
        form: Sequence[tuple[str, str]],
        files: Sequence[str],
        stored_bytes: int,
    ) -> Job:
        """Queue a job; it is as it was queued."""
        values = {
            **dict.fromkeys(_C.keys()),
            "id": job_id,
            "model": self._model,
            "owner": owner,
            "state": JobState.QUEUED,
            "form": json.dumps(form),
            "files": json.dumps(files),
            "stored_bytes": stored_bytes,
            "created_s": time.time(),
            **{"done": 0, "work": 0, "attempt": 0, "holder": "", "lease_until_s": 0.0},
        }
        with self._connected() as connection:
            connection.execute(_TABLE.insert().values(**values))
        return _job(values)

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """The job, if there is one; of this owner, if one is named."""
        query = _TABLE.select().where((_C.id == job_id) & (_C.model == self._model))
        if owner is not None:
            query = query.where(_C.owner == owner)
        with self._connected() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _job(row)

    def all(self) -> list[Job]:
        """Those of every owner, the oldest first."""
        query = _TABLE.select().where(_C.model == self._model).order_by(_C.created_s)
        with self._connected() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def unfinished(self) -> tuple[dict[JobState, int], float]:
        """How many jobs wait and run, and for how many seconds the oldest has waited."""
        mine = (_C.model == self._model) & _C.state.in_(_UNFINISHED)
        counts, first = sa.func.count(), sa.func.min(_C.created_s)
        query = sa.select(_C.state, counts, first).where(mine).group_by(_C.state)
        with self._connected() as connection:
            rows = {JobState(state): (n, at) for state, n, at in connection.execute(query)}
        waits = rows.get(JobState.QUEUED)
        found = {state: rows[state][0] if state in rows else 0 for state in _UNFINISHED}
        return found, max(0.0, time.time() - waits[1]) if waits else 0.0

    def claim(self) -> Job | None:
        """Hold a job that waits, or whose process fell silent; None if there is none.

        Owners take turns: first comes who has fewest jobs that run, then whose job this process
        began longest ago, or never; of one owner, the job that waited longest. One that has had
        `MAX_ATTEMPTS` is held only to be given up.
        """
        now, holder = time.time(), uuid.uuid4().hex
        mine, silent = _C.model == self._model, _C.lease_until_s < now
        running = mine & (_C.state == JobState.RUNNING)
        free = (mine & (_C.state == JobState.QUEUED)) | (running & silent)
        with self._connected() as connection:
            query = sa.select(_C.id, _C.attempt, _C.owner).where(free).order_by(_C.created_s)
            found = connection.execute(query).all()
            busy = Counter(connection.scalars(sa.select(_C.owner).where(running & ~silent)))
        # Kept here, not in the rows: who deletes what has ended would come first for ever.
        found = sorted(found, key=lambda row: (busy[row.owner], self._turns.get(row.owner, 0)))
        for job_id, attempt, owner in found:
            values = {
                "state": JobState.RUNNING,
                "holder": holder,
                "attempt": attempt + 1,
                "began_s": now,
                "lease_until_s": now + LEASE_S,
                **{"done": 0, "work": 0},
            }
            if self._update((_C.id == job_id) & free, values):
                self._turns[owner] = next(self._count)
                return self.get(job_id)
        return None

    def renew(self, job: Job, done: int, work: int, stored_bytes: int = 0) -> bool:
        """Say that the holder lives, how far it is, and what the job has on disk; false if it
        holds the job no more. What was kept for the job stays so.
        """
        values = {
            "lease_until_s": time.time() + LEASE_S,
            "done": done,
            "work": work,
            "stored_bytes": max(stored_bytes, job.stored_bytes),
        }
        return self._update(_held(job), values)

    def stored_beside(self, job: Job) -> int:
        """Bytes of the other jobs of its owner."""
        others = (_C.model == self._model) & (_C.owner == job.owner) & (_C.id != job.id)
        query = sa.select(sa.func.coalesce(sa.func.sum(_C.stored_bytes), 0)).where(others)
        with self._connected() as connection:
            return int(connection.scalar(query) or 0)

    def release(self, job: Job) -> None:
        """Let another process begin the job anew; the attempt does not count."""
        values = {"state": JobState.QUEUED, "holder": "", "attempt": job.attempt - 1}
        self._update(_held(job), values)

    def finish(
        self, job: Job, outcome: MMError | Mapping[str, Any], stored_bytes: int, keep_s: float
    ) -> bool:
        """Keep what came of a job; false if it was held no more, and nothing changed."""
        values: dict[str, Any] = {"expires_s": time.time() + keep_s, "stored_bytes": stored_bytes}
        if isinstance(outcome, MMError):
            values |= {
                "state": JobState.FAILED,
                "problem": problem_of(outcome).model_dump_json(),
            }
        else:
            values |= {"state": JobState.DONE, "result": json.dumps(outcome)}
        return self._update(_held(job), values)

    def delete(self, job_id: str) -> JobState | None:
        """Forget a job; its state until then, None where it was gone. Who works on it notices."""
        with self._connected() as connection:
            gone = _TABLE.delete().where(_C.id == job_id).returning(_C.state)
            state = connection.scalar(gone)
        return None if state is None else JobState(state)

    def expired(self) -> list[str]:
        """Jobs whose time is over."""
        query = sa.select(_C.id).where((_C.model == self._model) & (_C.expires_s < time.time()))
        with self._connected() as connection:
            return list(connection.scalars(query))

    def _update(self, where: sa.ColumnElement[bool], values: Mapping[str, Any]) -> bool:
        with self._connected() as connection:
            return connection.execute(_TABLE.update().where(where).values(**values)).rowcount == 1


def _away(error: Exception) -> ServiceError:
    return ServiceError("the jobs' database does not answer", got=type(error).__name__)


def _is_full(error: BaseException | None) -> bool:
    full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return full or getattr(error, "sqlstate", None) == _DISK_FULL


def _held(job: Job) -> sa.ColumnElement[bool]:
    return (_C.id == job.id) & (_C.state == JobState.RUNNING) & (_C.holder == job.holder)


def _job(row: Mapping[Any, Any]) -> Job:
    problem, result = row["problem"], row["result"]
    return Job(
        **{
            **row,
            "state": JobState(row["state"]),
            "form": [(name, text) for name, text in json.loads(row["form"])],
            "files": json.loads(row["files"]),
            "problem": None if problem is None else Problem.model_validate_json(problem),
            "result": None if result is None else json.loads(result),
        }
    )
