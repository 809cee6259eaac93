"""Uploads are decoded by other processes, which are warm, confined, and replaced when they die.

What a file can do to the libraries that read it happens in `mm_model.data.decoder`: it is killed
there, and the caller is told. Nothing that comes back is believed: text is checked against a
schema, and pixels are raw numbers of the shape that the checked header promised.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Annotated, Any, Protocol, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mm_model.api import max_body_bytes
from mm_model.data import raster
from mm_model.data.decoder import GDAL_OPTIONS
from mm_model.errors import (
    GeoreferenceError,
    MediaTypeError,
    MMError,
    OverloadedError,
    RasterError,
    ServiceError,
)

WORKERS = 2
"""Decoders of a replica: one waits while the other is replaced."""
CPU_S = 10
"""Processor time for all files of a request; the largest lawful ones take less than one second."""
WALL_S = 20.0
"""Time for all files of a request; the machine may be busy."""

FILE_MEMORY_BYTES = 1536 * 2**20
"""Room to decode a file of any size: blocks of some rows, in float64."""

_START_S = 60.0
_SESSIONS = 500  # of one process: memory that leaks, and whoever has got in, go with it
_LINE_BYTES = 8 * 2**20  # 65535 bands, which TIFF allows, need 4
_BESIDE_FILES_BYTES = 768 * 2**20  # one block of 4096 x 4096 pixels and three bands in float64
T = TypeVar("T")
_HERE = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "GDAL_DATA", "PROJ_DATA", "PROJ_LIB")


class Decoder(Protocol):
    """Reads the files of one request; names are what errors call them."""

    def header(self, content: bytes, name: str) -> raster.RasterHeader:
        """A file's header; raises RasterError or GeoreferenceError if it has none that is right."""

    def pixels(
        self,
        content: bytes,
        name: str,
        header: raster.RasterHeader,
        bands: Sequence[int | str] | None,
    ) -> raster.Raster:
        """All bands of a file, or these (numbers from 1, or names).

        Raises:
            RasterError: it is not whole.
        """


class InProcess:
    """Decodes here: files of one's own."""

    def header(self, content: bytes, name: str) -> raster.RasterHeader:
        return raster.read_header(content, name)

    def pixels(
        self,
        content: bytes,
        name: str,
        header: raster.RasterHeader,
        bands: Sequence[int | str] | None,
    ) -> raster.Raster:
        return raster.read_raster(content, name, bands=bands)


class _Told(BaseModel):
    """An error of a decoder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    code: str
    what: str
    got: str | None
    allowed: str | None
    remedy: str | None

    def error(self) -> MMError:
        kind = GeoreferenceError if self.code == GeoreferenceError.code else RasterError
        return kind(self.what, got=self.got, allowed=self.allowed, remedy=self.remedy)


class _Reply(BaseModel):
    """A line of a decoder; one of these is there."""

    model_config = ConfigDict(extra="forbid")

    ready: bool = False
    error: _Told | None = None
    header: raster.RasterHeader | None = None
    shape: tuple[int, int, int] | None = None
    dtype: Annotated[str, Field(pattern=r"^(u?int(8|16|32|64)|float(16|32|64))$")] | None = None


_REPLY = TypeAdapter(_Reply)


class _EndedError(Exception):
    """A decoder is gone, was killed, or says what no decoder says."""


class _Worker:
    """One process, and the pipes to it; for one thread at a time."""

    def __init__(self, memory_bytes: int, cpu_s: int, file: IO[bytes] | None = None) -> None:
        handed = () if file is None else (file.fileno(),)
        # Nothing of the environment that is not needed: it holds the platform's secrets.
        kept = {name: os.environ[name] for name in _HERE if name in os.environ}
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mm_model.data.decoder",
                *map(str, (memory_bytes, cpu_s, *handed)),
            ],
            pass_fds=handed,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff would repeat what the file says
            env={**kept, **threads, **GDAL_OPTIONS, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd="/",
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._tasks: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self._is_ready = self._is_killed = False
        self.sessions = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        return self._is_killed or self._process.poll() is not None

    def kill(self) -> None:
        """End the process now."""
        self._is_killed = True
        self._process.kill()

    def begin(self, forget: bool = True) -> None:
        """Be ready for a request: forget the one before, and have its time.

        Raises:
            ServiceError: it cannot start.
        """
        if not self._is_ready:
            try:
                with self.at_most(_START_S):
                    self._is_ready = self._reply().ready
            except _EndedError:
                raise ServiceError("no decoder starts", got=self.end()) from None
        self.sessions += 1
        self._send({"do": "begin", "forget": forget})

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Kill the process if the block takes longer; who waits for its answer sees it end."""
        timer = threading.Timer(seconds, self.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def header(self, content: bytes, name: str) -> raster.RasterHeader:
        """Of a file's bytes; of the open one that was handed over, if there is one."""
        self._send({"do": "header", "name": name, "bytes": len(content)}, content)
        header = self._reply().header
        if header is None or not header.band_names:
            raise _EndedError
        each = (header.band_names, header.colors, header.units, header.scales, header.offsets)
        if len({len(of_bands) for of_bands in each}) != 1:
            raise _EndedError
        return header

    def pixels(
        self,
        content: bytes,
        name: str,
        header: raster.RasterHeader,
        bands: Sequence[int | str] | None,
        window: tuple[int, int, int, int] | None = None,
    ) -> raster.Raster:
        numbers = raster.band_numbers(header, bands, name)
        shape = header.grid.shape if window is None else window[2:]
        self._send({"do": "pixels", "name": name, "bands": bands, "window": window})
        reply = self._reply()
        if reply.dtype is None or reply.shape != (len(numbers), *shape):
            raise _EndedError
        values = np.empty(reply.shape, reply.dtype)
        known = np.empty(shape, np.uint8)
        self._fill(values)
        self._fill(known)
        scales = tuple(header.scales[n - 1] for n in numbers)
        offsets = tuple(header.offsets[n - 1] for n in numbers)
        return raster.Raster(values, known != 0, scales, offsets, header)

    def _send(self, task: dict[str, Any], content: bytes = b"") -> None:
        try:
            self._tasks.write(json.dumps(task).encode() + b"\n")
            self._tasks.write(content)
            self._tasks.flush()
        except OSError as error:
            raise _EndedError from error

    def _reply(self) -> _Reply:
        line = self._answers.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise _EndedError
        try:
            reply = _REPLY.validate_json(line)
        except ValidationError as error:
            raise _EndedError from error
        if reply.error is not None:
            raise reply.error.error()
        return reply

    def _fill(self, array: np.ndarray[Any, Any]) -> None:
        into = memoryview(array.data).cast("B")
        while into:
            got = self._answers.readinto(into)  # type: ignore[attr-defined]
            if not got:
                raise _EndedError
            into = into[got:]

    def end(self) -> str:
        """Kill it; returns how it had ended before, if it had."""
        try:
            self._process.wait(0.5)  # a process that dies closes its pipes first
        except subprocess.TimeoutExpired:
            self._process.kill()
        code = self._process.wait()
        for pipe in (self._tasks, self._answers):
            try:
                pipe.close()
            except OSError:  # what was not sent is not missed
                continue
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


class FileDecoder:
    """Reads one file of any size, strip by strip, in a process of its own.

    Args:
        path: of the file, which may come from anybody.
        name: what errors call it.
        memory_bytes: by which the process may grow.
        cpu_s: processor time for a strip.
        wall_s: time for a strip.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        memory_bytes: int = FILE_MEMORY_BYTES,
        cpu_s: int = CPU_S,
        wall_s: float = WALL_S,
    ) -> None:
        self._name, self._wall_s, self._cpu_s = name, wall_s, cpu_s
        self._memory_bytes = memory_bytes
        with path.open("rb") as file:
            self._worker = _Worker(memory_bytes, cpu_s, file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.kill()
        self._worker.end()

    def header(self) -> raster.RasterHeader:
        """The file's header; raises as `pixels` does."""
        with self._limited():
            return self._worker.header(b"", self._name)

    def pixels(
        self,
        header: raster.RasterHeader,
        bands: Sequence[int | str] | None,
        window: tuple[int, int, int, int],
    ) -> raster.Raster:
        """A window (row, column, height, width) of the bands.

        Raises:
            RasterError: the file is not whole.
            MediaTypeError: the process died of it, or was killed since it took too long.
        """
        with self._limited():
            return self._worker.pixels(b"", self._name, header, bands, window)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            self._worker.begin(forget=False)
            with self._worker.at_most(self._wall_s):
                yield
        except _EndedError:
            raise _undecodable(
                self._name, self._worker.end(), self._cpu_s, self._wall_s, self._memory_bytes
            ) from None


def _undecodable(
    what: str, how: str, cpu_s: int, wall_s: float, memory_bytes: int
) -> MediaTypeError:
    return MediaTypeError(
        f"{what} cannot be decoded",
        got=f"a decoder that ended ({how})",
        allowed=f"files that decode within {cpu_s} s of processor time, "
        f"{wall_s:g} s and {math.ceil(memory_bytes / 2**20)} MiB",
        remedy="write them anew with gdal_translate -of GTiff -co TILED=YES",
    )


class DecoderPool:
    """Warm decoders for one request each.

    Args:
        memory_bytes: by which a decoder's address space may grow.
        cpu_s: processor time for the files of a request.
        wall_s: time for the files of a request.
        workers: how many there are.
    """

    def __init__(
        self,
        memory_bytes: int,
        *,
        cpu_s: int = CPU_S,
        wall_s: float = WALL_S,
        workers: int = WORKERS,
    ) -> None:
        self._memory_bytes, self._cpu_s, self._wall_s = memory_bytes, cpu_s, wall_s
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._lock = threading.Lock()
        self._workers, self._living = workers, set[_Worker]()
        self.replaced = 0
        self._threads = ThreadPoolExecutor(workers, "decode")
        atexit.register(self.close)

    async def run(self, work: Callable[..., T], *args: object) -> T:
        """`work(*args)`, which takes a decoder, in one of as many threads as there are decoders.

        Who waits for a decoder holds up nobody else: the event loop's own threads write answers,
        and say whether the replica is alive.
        """
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, partial(context.run, work, *args)
        )

    def start(self) -> None:
        """Start what is not there yet; does not wait until they are warm."""
        with self._lock:
            for _ in range(self._workers - len(self._living)):
                self._add()

    @contextmanager
    def decoder(self) -> Iterator[Decoder]:
        """A decoder of one's own, for the files of one request.

        Raises:
            OverloadedError: none became free.
            MediaTypeError: it died of a file, or was killed since it took too long.
        """
        self.start()
        worker, is_clean = self._borrow(), False
        try:
            worker.begin()
            with worker.at_most(self._wall_s):
                yield worker
        except _EndedError:
            how = self._replace(worker)
            raise _undecodable(
                "a part", how, self._cpu_s, self._wall_s, self._memory_bytes
            ) from None
        except MMError:
            is_clean = True  # it, or the check of what it said, refused the file
            raise
        else:
            is_clean = True
        finally:
            if is_clean:
                self._give_back(worker)
            elif worker in self._living:
                self._replace(worker)  # who knows what is still in its pipes

    def close(self) -> None:
        """Kill all; the pool may be used again."""
        with self._lock:
            living, self._living = self._living, set()
            self._idle = queue.Queue()
        for worker in living:
            worker.kill()
            worker.end()

    @property
    def pids(self) -> list[int]:
        return sorted(worker.pid for worker in self._living)

    def _borrow(self) -> _Worker:
        try:
            while (worker := self._idle.get(timeout=2 * self._wall_s)).is_dead:
                self._replace(worker)  # of something else than a file, such as want of memory
        except queue.Empty:
            raise OverloadedError(
                "every decoder is busy", allowed=self._workers, remedy="try again in a second"
            ) from None
        return worker

    def _give_back(self, worker: _Worker) -> None:
        if worker.sessions >= _SESSIONS or worker.is_dead:
            self._replace(worker)
        else:
            self._idle.put(worker)

    def _replace(self, worker: _Worker) -> str:
        with self._lock:
            self._living.discard(worker)
            self.replaced += 1
            self._add()
        return worker.end()

    def _add(self) -> None:
        worker = _Worker(self._memory_bytes, self._cpu_s)
        self._living.add(worker)
        self._idle.put(worker)


@lru_cache
def shared_pool(max_side_px: int) -> DecoderPool:
    """This process's pool for images of this size; decoders start with the first use."""
    return DecoderPool(3 * max_body_bytes(max_side_px) + _BESIDE_FILES_BYTES)
