"""`mm jobs`: what the endpoint has to do, for who runs it."""

from __future__ import annotations

import os
import re
import time

from rich.console import Console
from rich.table import Table

from mm_model.adapters import environment
from mm_model.api import JobState
from mm_model.config import load_params
from mm_model.errors import ConfigError
from mm_model.serving.jobs.routes import JobsPlace, forget, info_of
from mm_model.serving.jobs.store import Job, JobStore


def jobs(cancel: str | None) -> None:
    """List the jobs of all owners, or cancel one.

    Raises:
        ConfigError: there is no job of that id.
        ServiceError: the database does not answer.
    """
    model = load_params().register_.model
    place = JobsPlace(environment.jobs_folder(model), os.environ.get("MM_JOBS_URL", ""), model)
    console = Console()
    if not console.is_terminal:  # a line each, for grep
        console = Console(width=240)
    if not place.url and not place.folder.is_dir():  # a SQLite that is opened would be made
        if cancel is None:
            console.print(f"no endpoint of {model} has run here: there are no jobs")
            return
        raise _unknown(cancel)
    store = JobStore(place.database, model)
    try:
        if cancel is None:
            console.print(_table(store.all()))
        elif re.fullmatch("[0-9a-f]{32}", cancel) and forget(store, place.folder, cancel):
            console.print(f"job {cancel} is ended and forgotten")
        else:
            raise _unknown(cancel)
    finally:
        store.close()


def _unknown(job_id: str) -> ConfigError:
    return ConfigError(f"no job {job_id[:40]}", remedy="`mm jobs` lists them; it may have expired")


def _table(found: list[Job]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("job", "state", "owner", "asked", "done", "left", "stored", "attempt", "problem"):
        table.add_column(name, overflow="fold", no_wrap=name == "job")
    for job in found:
        told = info_of(job)
        left = "" if told.time_left_s is None else _span(told.time_left_s)
        table.add_row(
            job.id,
            job.state,
            job.owner or "-",
            f"{_span(time.time() - job.created_s)} ago",
            f"{told.progress:.0%}",
            left,
            f"{job.stored_bytes / 1e6:.1f} MB",
            str(job.attempt),
            told.problem.detail if told.problem and job.state is JobState.FAILED else "",
        )
    table.caption = f"{len(found)} in all"
    return table


def _span(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
