"""What a training reports, in a journal on disk first and then in MLflow.

The training only ever appends lines to the journal; the driver brings them to MLflow in a thread of
its own. So MLflow may be away at any time without training waiting for it, and a journal that could
not be sent is sent later by `flush_backlog`. Steps that are repeated after a crash are not written
twice, and lines that are sent twice change nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil

from mm_model.adapters import environment
from mm_model.errors import ServiceError

if TYPE_CHECKING:
    from mlflow import MlflowClient

JOURNAL, SENT, RUN_ID = "journal.jsonl", "journal.sent", "mlflow_run_id"
_KEY = "mm.journal"  # tag that finds the run again if its id was lost between two writes
_LINES_A_REQUEST = 100
_EVERY_S = 2.0
_FINAL_S = 20.0


class Journal:
    """A `training.loop.Reporter` that appends to the journal of a run's folder.

    Args:
        folder: the run's, seen by driver and workers under the same path.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / JOURNAL
        lines = _complete_lines(self._file)
        if self._file.exists():
            os.truncate(self._file, sum(map(len, lines)))  # a line that a crash has cut off
        self._last = {"metrics": -1, "picture": -1}
        for line in map(json.loads, lines):
            if line["kind"] in self._last:
                self._last[line["kind"]] = max(self._last[line["kind"]], line["step"])
        self.begun = bool(lines)

    def begin(
        self,
        experiment: str,
        name: str,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
    ) -> None:
        """Open the run, or reopen it where the journal has begun."""
        if self.begun:
            self._append("resume", tags=dict(tags))
        else:
            about = {"experiment": experiment, "name": name, "key": uuid.uuid4().hex}
            flat = {k: str(v) for k, v in _flatten(params)}
            self._append("begin", **about, params=flat, tags=dict(tags))
        self.begun = True

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step; those of a step that is repeated are left out."""
        if step > self._last["metrics"]:
            self._last["metrics"] = step
            self._append("metrics", step=step, values={**values, **_system_metrics()})

    def picture(self, step: int, save: Callable[[Path], None]) -> None:
        """Have a picture written to a path of ours."""
        if step > self._last["picture"]:
            self._last["picture"] = step
            name = f"sheets/step-{step:07d}.png"
            (self.folder / name).parent.mkdir(exist_ok=True)
            save(self.folder / name)
            self._append("picture", step=step, file=name)

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED or KILLED, as MLflow calls them."""
        self._append("end", status=status)

    def _append(self, kind: str, **content: object) -> None:
        line = json.dumps({"kind": kind, "time_ms": int(time.time() * 1000), **content})
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def read_journal(folder: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The journal's records from a byte on, and the byte to read on from."""
    lines = _complete_lines(folder / JOURNAL, start)
    return [json.loads(line) for line in lines], start + sum(map(len, lines))


@contextmanager
def shipping(folder: Path) -> Iterator[None]:
    """While inside, what the journal gains is brought to MLflow whenever it can be reached."""
    stop = threading.Event()

    def ship() -> None:
        while not stop.wait(_EVERY_S):
            with suppress(ServiceError):  # it stays in the journal
                flush_backlog(folder)

    thread = threading.Thread(target=ship, name="mlflow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_FINAL_S)
        if not thread.is_alive():
            with suppress(ServiceError):
                flush_backlog(folder)


def flush_backlog(folder: Path) -> str | None:
    """Bring what MLflow has not yet got of a run's journal to MLflow.

    Returns:
        The run's id in MLflow; None if the folder holds no journal.

    Raises:
        ServiceError: MLflow is away, or refuses; what was sent before is not sent again.
    """
    if not (folder / JOURNAL).exists():
        return None
    with (folder / "journal.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # driver and registration may meet
        return _flush(folder)


def run_id_of(folder: Path) -> str | None:
    """The MLflow run of a run's folder; None while MLflow has not heard of it."""
    file = folder / RUN_ID
    return file.read_text() if file.exists() else None


def _flush(folder: Path) -> str | None:
    sent_file = folder / SENT
    sent = int(sent_file.read_text()) if sent_file.exists() else 0  # bytes
    lines = _complete_lines(folder / JOURNAL, sent)
    if not lines:
        return run_id_of(folder)
    with _connected() as client:
        for start in range(0, len(lines), _LINES_A_REQUEST):
            part = lines[start : start + _LINES_A_REQUEST]
            _send(client, folder, [json.loads(line) for line in part])
            sent += sum(len(line) for line in part)
            _replace(sent_file, str(sent))
    return run_id_of(folder)


def _send(client: MlflowClient, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    from mlflow.entities import Metric

    metrics = []
    for line in lines:
        if line["kind"] == "begin":
            _replace(folder / RUN_ID, _find_or_create(client, line))
        run_id = run_id_of(folder)
        assert run_id is not None, "a journal starts with its beginning"
        if line["kind"] == "metrics":
            at = (line["time_ms"], line["step"])
            metrics += [Metric(name, value, *at) for name, value in line["values"].items()]
        elif line["kind"] == "picture":
            client.log_artifact(run_id, str(folder / line["file"]), "sheets")
        elif line["kind"] == "resume":
            client.update_run(run_id, "RUNNING")
            for key, value in line["tags"].items():
                client.set_tag(run_id, key, value)
        elif line["kind"] == "end":
            client.set_terminated(run_id, line["status"], line["time_ms"])
    for start in range(0, len(metrics), 1000):  # the most that one request may hold
        # The database ignores a metric that it has, with its time and step, already.
        client.log_batch(run_id, metrics[start : start + 1000])


def _find_or_create(client: MlflowClient, begin: Mapping[str, Any]) -> str:
    from mlflow.entities import Param

    name = begin["experiment"]
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    found = client.search_runs([experiment], f"tags.`{_KEY}` = '{begin['key']}'")
    if found:
        run_id = str(found[0].info.run_id)
    else:
        tags = {**begin["tags"], _KEY: begin["key"]}
        run_id = str(
            client.create_run(experiment, begin["time_ms"], tags, begin["name"]).info.run_id
        )
    params = [Param(key, value[:6000]) for key, value in begin["params"].items()]
    for start in range(0, len(params), 100):
        client.log_batch(run_id, params=params[start : start + 100])
    return run_id


@contextmanager
def _connected() -> Iterator[MlflowClient]:
    """A client of MLflow that soon gives up; all that goes wrong is a ServiceError."""
    url = environment.mlflow_url()
    if url.startswith("http"):
        try:
            # Asked first, since MLflow takes seconds to import, and its own retries minutes.
            httpx.get(f"{url}/health", timeout=3).raise_for_status()
        except httpx.HTTPError as error:
            raise ServiceError(
                f"MLflow does not answer at {url}", got=error, remedy="start it with `mm up`"
            ) from error
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import requests
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(url)
    except (requests.RequestException, MlflowException) as error:
        raise ServiceError(f"MLflow at {url} refused", got=str(error)[:300]) from error


def _complete_lines(file: Path, start: int = 0) -> list[bytes]:
    """The journal's lines from a byte on; one that is cut off, by a crash or by now, is none."""
    if not file.exists():
        return []
    with file.open("rb") as stream:
        stream.seek(start)
        lines = stream.readlines()
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _replace(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(file)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _system_metrics() -> dict[str, float]:
    """Load of this machine, under the names that MLflow shows as system metrics."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
    }
