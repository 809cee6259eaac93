"""A process that decodes GeoTIFFs of strangers, and can do little else.

`python -m mm_model.data.decoder MEMORY_BYTES CPU_S [DESCRIPTOR]`
It reads tasks from standard input and answers on standard output, each a line of JSON with raw
bytes behind it. A file too large to be sent is handed over open, by its descriptor. Once it is warm
it can open no file and no socket any more, write no file and start no process, and has only so much
memory and processor time; see `confine`. Who starts it kills it when it takes too long, and
believes nothing that it says: see `mm_model.serving.decoders`.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mm_model.data import raster
from mm_model.errors import GeoreferenceError, MMError, RasterError
from mm_model.geo.grid import Grid

GDAL_OPTIONS: Mapping[str, str] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no files beside the one that was given
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_CACHEMAX": "64",  # MB
    "GDAL_NUM_THREADS": "1",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": "{noext}",
    "PROJ_NETWORK": "OFF",
}
"""What this process is started with: GDAL and PROJ fetch nothing and look at nothing else."""

_TEXT = 256  # characters of a name in the file that are passed on


def main() -> None:
    """Answer tasks until standard input ends.

    Arguments: bytes of memory, processor seconds, and the descriptor of an open file, if there is.
    """
    memory_bytes, cpu_s, *descriptor = map(int, sys.argv[1:])
    large = _open_file(descriptor[0]) if descriptor else None
    tasks, answers = sys.stdin.buffer, sys.stdout.buffer
    _warm_up()
    confine(memory_bytes)
    _say(answers, {"ready": True})
    files: dict[str, bytes | raster.OpenFile] = {}
    while line := tasks.readline():
        task = json.loads(line)
        if task["do"] == "begin":
            if task["forget"]:
                files.clear()
            allow_cpu(cpu_s)
            continue
        try:
            _answer(task, files, tasks, answers, large)
        except (RasterError, GeoreferenceError) as error:
            _say(answers, {"error": _told(error)})


class _View(io.RawIOBase):
    """Reads an open file at a place of its own, without another descriptor."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._descriptor, self._size, self._at = descriptor, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        got = os.preadv(self._descriptor, [buffer], self._at)
        self._at += got
        return got


def _open_file(descriptor: int) -> raster.OpenFile:
    size_bytes = os.fstat(descriptor).st_size
    return raster.OpenFile(lambda: io.BufferedReader(_View(descriptor, size_bytes)), size_bytes)


def confine(memory_bytes: int) -> None:
    """Take from this process, for good, what decoding does not need.

    Afterwards every new file descriptor is refused by the kernel, so that neither files nor sockets
    can be opened, whatever runs here; nothing can be written to a file; the address space may grow
    by `memory_bytes`. Only the superuser could take it back.
    """
    descriptors = max(int(entry.name) for entry in Path(_DESCRIPTORS).iterdir()) + 1
    limits = {
        resource.RLIMIT_NOFILE: _taken(descriptors),
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    if sys.platform == "linux":  # elsewhere it is not kept to, or counts what others share
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + memory_bytes
    for name, value in limits.items():
        resource.setrlimit(name, (value, value))


def allow_cpu(seconds: int) -> None:
    """Let this process compute so much longer; then the kernel ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


def _taken(descriptors: int) -> int:
    """The least limit at which the descriptors that are open still work, and fill the numbers."""
    # Numbers below the limit that are free would let as many files be opened.
    for number in range(descriptors):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(0, number)
    return descriptors


def _warm_up() -> None:
    """Have GDAL, PROJ and Python open whatever they need to decode."""
    grid = Grid("EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), 16, 16)
    for dtype in ("uint8", "float32"):
        content = raster.encode_geotiff(
            np.zeros((1, 16, 16), dtype), grid, ["band"], nodata=0, tags={}
        )
        raster.read_header(content)
        raster.read_raster(content)
        raster.read_raster(raster.OpenFile(partial(io.BytesIO, content), len(content)))
        try:
            raster.read_raster(content[:-64])
            raster.read_header(b"II*\0")
        except RasterError as error:
            json.dumps(_told(error))


def _answer(
    task: Mapping[str, Any],
    files: dict[str, bytes | raster.OpenFile],
    tasks: BinaryIO,
    answers: BinaryIO,
    large: raster.OpenFile | None,
) -> None:
    name = task["name"]
    if task["do"] == "header":
        files[name] = large or tasks.read(task["bytes"])
        header = raster.read_header(files[name], name)
        # Tags may be of any length, and nobody asks for others.
        plain = replace(
            header,
            band_names=tuple(text[:_TEXT] for text in header.band_names),
            units=tuple(text[:_TEXT] for text in header.units),
            tags={k: header.tags[k][:_TEXT] for k in raster.OFFSET_TAGS if k in header.tags},
        )
        _say(answers, {"header": asdict(plain)})
        return
    found = raster.read_raster(files[name], name, bands=task["bands"], window=task.get("window"))
    values = np.ascontiguousarray(found.values)
    _say(answers, {"shape": values.shape, "dtype": values.dtype.name})
    answers.write(values.data)
    answers.write(np.ascontiguousarray(found.valid).data)
    answers.flush()


def _told(error: MMError) -> dict[str, str | None]:
    parts = {"what": error.what, "got": error.got, "allowed": error.allowed, "remedy": error.remedy}
    return {"code": error.code, **{key: text and text[:512] for key, text in parts.items()}}


def _say(answers: BinaryIO, what: Mapping[str, Any]) -> None:
    answers.write(json.dumps(what).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
