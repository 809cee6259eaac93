"""A training's progress for the person who waits, from its journal, wherever its workers run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_model.adapters.mlflow_reporter import read_journal

_EVERY_S = 0.5
_PLAIN_EVERY_S = 15.0


@contextmanager
def following(folder: Path, steps: int) -> Iterator[None]:
    """While inside, progress is shown on stderr: a bar, or plain lines where that is no terminal.

    Args:
        folder: the run's.
        steps: of the whole training.
    """
    console = Console(stderr=True)
    show = _bar if console.is_terminal else _lines
    stop = threading.Event()
    thread = threading.Thread(target=show, args=(console, folder, steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _records(folder: Path, stop: threading.Event, every_s: float) -> Iterator[Mapping[str, Any]]:
    """The newest figures, each time that there are new ones; once more after the end."""
    _, at = read_journal(folder)  # what an earlier attempt wrote is no news
    ended = False
    while not ended:
        ended = stop.wait(every_s)
        records, at = read_journal(folder, at)
        if figures := [r for r in records if r["kind"] == "metrics"]:
            yield figures[-1]


def _summary(record: Mapping[str, Any]) -> str:
    values = record["values"]
    return f"loss {values['loss']:.3f}, {values['samples_per_s']:.0f} samples/s"


def _lines(console: Console, folder: Path, steps: int, stop: threading.Event) -> None:
    began: tuple[float, int] | None = None
    for record in _records(folder, stop, _PLAIN_EVERY_S):
        step, now = record["step"], record["time_ms"] / 1000
        left = ""
        if began is not None and step > began[1]:
            seconds = (steps - step) * (now - began[0]) / (step - began[1])
            left = f", {seconds / 60:.1f} min left"
        began = began or (now, step)
        console.print(f"step {step}/{steps}: {_summary(record)}{left}", highlight=False)


def _bar(console: Console, folder: Path, steps: int, stop: threading.Event) -> None:
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[summary]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, summary="starting", start=False)
        for record in _records(folder, stop, _EVERY_S):
            if not progress.tasks[0].started:
                progress.reset(task, total=steps, start=True)
            progress.update(task, completed=record["step"], summary=_summary(record))
