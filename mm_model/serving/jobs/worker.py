"""One job at a time, in a thread of a replica: uploads to copies, copies to a scene, a scene to one
file.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mm_model.api import each
from mm_model.config import JobsConfig
from mm_model.data import raster
from mm_model.data.files import needs_room
from mm_model.errors import DeadlineError, MMError, ServiceError, StorageError
from mm_model.serving.batching import ModelSource, Served
from mm_model.serving.copies import copied_to, copy_file
from mm_model.serving.generator import Generator
from mm_model.serving.jobs.store import LEASE_S, MAX_ATTEMPTS, Job, JobStore
from mm_model.serving.metrics import Metrics
from mm_model.serving.overlay import labelled
from mm_model.serving.requests import SceneRequest
from mm_model.serving.results import pack
from mm_model.serving.scenes import write_scene
from mm_model.serving.uploads import JOB_FIELDS, Part, read_scene_request

UPLOADS = "uploads"
"""Below a job's folder: what was sent, as it came."""

_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0  # between looks for work, and how soon a cancelled job ends
_STOP_S = 10.0
_SWEEP_S = 3600.0
_OLD_S = 6 * 3600.0  # longer than an upload takes
# Beside a request, a job gets a third of what that gets of a core: it gives way, and yet who holds
# the interpreter's lock comes to letting go of it.
_NICE = 5


class _LostError(Exception):
    """The job is cancelled, or held by another process; or this one ends."""


class Worker:
    """Works off jobs until it is closed.

    Args:
        store: where they are.
        folder: what they hold, a folder for each; every replica sees the same.
        source: says which model serves when a job begins.
        config: how long results are kept, and how large scenes may be.
        counted: where it counts.
    """

    def __init__(
        self,
        store: JobStore,
        folder: Path,
        source: ModelSource,
        config: JobsConfig,
        counted: Metrics,
    ) -> None:
        self._store, self._folder, self._source, self._config = store, folder, source, config
        self._counted = counted
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work; does nothing where that has begun."""
        with self._lock:
            if self._thread is None:
                self._ending.clear()
                self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop between two windows; the job is left to others."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._ending.set()
            thread.join(_STOP_S)

    def _loop(self) -> None:
        if sys.platform == "linux":  # elsewhere it would not be of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        keep_s, sweep_at, said = self._config.keep_hours * 3600, 0.0, ""
        while not self._ending.wait(_LOOK_S):
            try:
                if time.monotonic() >= sweep_at:
                    self._sweep()
                    sweep_at = time.monotonic() + _SWEEP_S
                self._tell()
                for job_id in self._store.expired():
                    self._store.delete(job_id)
                    shutil.rmtree(self._folder / job_id, ignore_errors=True)
                served = self._source.served
                job = self._store.claim() if served is not None else None
                said = ""
                if job is not None and served is not None:
                    self._work(job, served, keep_s)
            except Exception as error:  # what is away comes back; the thread must be there then
                if repr(error) != said:  # not every second
                    _LOG.exception("jobs are not worked off")
                said = repr(error)

    def _work(self, job: Job, served: Served, keep_s: float) -> None:
        place = self._folder / job.id
        # An attempt before this one may still be writing.
        folder = place / f"{job.attempt}-{job.holder[:8]}"
        outcome: MMError | dict[str, object]
        began = time.monotonic()
        try:
            with (
                _Held(self._store, job, place, self._ending, self._tell, self._config) as held,
                needs_room("what the job makes"),
            ):
                outcome = self._answer(job, served, place, folder, held)
        except _LostError:
            shutil.rmtree(folder, ignore_errors=True)
            if self._ending.is_set():
                self._store.release(job)
            self._lost(job, began)
            return
        except MMError as error:
            outcome = error
        except Exception as error:
            _LOG.exception("job %s", job.id)
            outcome = MMError(f"internal error ({type(error).__name__})")
        if isinstance(outcome, MMError):
            shutil.rmtree(folder, ignore_errors=True)
        size = size_bytes(folder)
        if self._store.finish(job, outcome, size, keep_s):
            self._ended(outcome.code if isinstance(outcome, MMError) else "done", began)
            # What was sent, and what attempts have left whose process was killed.
            for other in set(place.glob("*")) - {folder}:
                shutil.rmtree(other, ignore_errors=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            self._lost(job, began)

    def _tell(self) -> None:
        """How many jobs there are, for who looks at the figures."""
        found, waits_s = self._store.unfinished()
        self._counted.job_waits.set(waits_s)
        for state, count in found.items():
            self._counted.jobs.labels(state).set(count)

    def _ended(self, outcome: str, began: float) -> None:
        self._counted.job_seconds.labels(outcome).observe(time.monotonic() - began)

    def _lost(self, job: Job, began: float) -> None:
        """A job that is held no more: where it was deleted, remove what it has left."""
        if self._store.get(job.id) is None:
            self._ended("cancelled", began)
            shutil.rmtree(self._folder / job.id, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what uploads and jobs left whose process was killed."""
        for place in self._folder.iterdir():
            is_old = place.is_dir() and time.time() - place.stat().st_mtime > _OLD_S
            if is_old and self._store.get(place.name) is None:
                shutil.rmtree(place, ignore_errors=True)

    def _answer(
        self, job: Job, served: Served, place: Path, folder: Path, held: _Held
    ) -> dict[str, object]:
        if job.attempt > MAX_ATTEMPTS:
            raise ServiceError(
                "the process that worked on the job ended", got=f"{MAX_ATTEMPTS} times"
            )
        generator = for_scenes(served.generator, self._config)
        for left in place.glob("*"):  # by an attempt whose process was killed
            if left.name != UPLOADS:
                shutil.rmtree(left, ignore_errors=True)
        copies = folder / "copies"
        copies.mkdir(parents=True, exist_ok=True)
        request = copied_to(copies, parse(job.form, job.files, generator))
        for name, paths in each(request.observed).items():
            for label, path in labelled(name, paths):
                upload, modality = place / UPLOADS / path.stem, generator.modality(name)
                copy_file(upload, label, modality, generator, path, held.check)
        written = write_scene(generator, request, served.identity, folder, held.tell)
        shutil.rmtree(copies)
        height, width = raster.read_header(written[0]).grid.shape
        path, media_type, provenance = pack(written, list(generator.modalities.values()))
        held.check_room()
        for name in provenance.targets:
            self._counted.pixels.labels(name).inc(request.samples * height * width)
        return {
            "file": str(path.relative_to(place)),
            "media_type": media_type,
            "headers": provenance.headers(),
        }


class _Held:
    """Says that the job's holder lives while the block runs."""

    def __init__(
        self,
        store: JobStore,
        job: Job,
        place: Path,
        ending: threading.Event,
        tell: Callable[[], None],
        config: JobsConfig,
    ) -> None:
        self._store, self._job, self._ending, self._tell_all = store, job, ending, tell
        self._place, self._max_bytes = place, config.max_stored_mb * 2**20
        self._max_hours = config.max_hours
        self._until = time.monotonic() + 3600 * config.max_hours
        self._over, self._lost = threading.Event(), threading.Event()
        self._at, self._owner_bytes = (0, 0), 0
        self._thread = threading.Thread(target=self._renew, name="job held", daemon=True)

    def __enter__(self) -> _Held:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        if time.monotonic() > self._until:
            raise DeadlineError(
                "the job took too long",
                allowed=f"{self._max_hours:g} h (serve.jobs.max_hours)",
                remedy="ask for pieces of it, fewer samples or fewer steps",
            )
        if self._lost.is_set() or self._ending.is_set():
            raise _LostError
        if self._owner_bytes > self._max_bytes:
            raise StorageError(
                "jobs hold too many bytes, this one's among them",
                got=f"{self._owner_bytes / 2**20:.1f} MiB",
                allowed=f"{self._max_bytes / 2**20:.0f} MiB (serve.jobs.max_stored_mb)",
                remedy="delete jobs whose results you have, or ask for fewer samples or targets",
            )

    def check_room(self) -> None:
        """Check at once, as is done every second."""
        self._measure()
        self.check()

    def _measure(self) -> int:
        """Bytes that the job has on disk; those of all jobs of its owner are kept for `check`."""
        mine = size_bytes(self._place)
        self._owner_bytes = mine + self._store.stored_beside(self._job)
        return mine

    def tell(self, done: int, work: int) -> None:
        self._at = (done, work)
        self.check()

    def _renew(self) -> None:
        said = ""
        while not self._over.wait(min(_LOOK_S, LEASE_S / 4)):
            try:
                if not self._store.renew(self._job, *self._at, self._measure()):
                    self._lost.set()
                    return
                self._tell_all()
            except Exception as error:  # until the lease is over, the database may come back
                if repr(error) != said:  # not every second
                    _LOG.exception("job %s: the database is away", self._job.id)
                said = repr(error)


def size_bytes(folder: Path) -> int:
    """Of all files below a folder; 0 if there is none."""
    size = 0
    for place, _, names in os.walk(folder):  # which takes it that folders come and go
        for name in names:
            with suppress(FileNotFoundError):
                size += (Path(place) / name).stat().st_size
    return size


def for_scenes(generator: Generator, config: JobsConfig) -> Generator:
    """The same generator, for larger images."""
    larger = copy.copy(generator)
    larger.max_side_px = config.max_side_px
    return larger


def parse(
    form: Sequence[tuple[str, str]], files: Sequence[str], generator: Generator
) -> SceneRequest:
    """The request of a job's form and files, which lie below `UPLOADS` under its paths' stems.

    Raises:
        RequestError: they make none.
    """
    parts = [Part(name, text) for name, text in form]
    parts += [Part(name, Path(name)) for name in files]
    request, _ = read_scene_request(parts, JOB_FIELDS, generator)
    return request
