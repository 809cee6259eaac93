"""Folders on this machine or in object storage, by path or URL. The only place that knows obstore.

A name in a folder is a whole file or absent, whenever a process dies. Credentials, region and
endpoint are those of the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, an instance's role).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import BaseError

from mm_model.errors import ConfigError, DataError, ServiceError

Range = tuple[str, int, int]
"""Name of a file, first byte, number of bytes."""

_URL = re.compile(r"^(s3|gs|az)://[^/]+(/.+)?$")
_AT_ONCE = 16  # requests, of which most of the time is waiting
_PIECE_BYTES = 16 << 20  # of a file that is sent or fetched


@dataclass
class New:
    """A file that is being written, and the name that it shall have."""

    path: Path
    name: str


class Folder(Protocol):
    """Files by name; may be pickled."""

    @property
    def url(self) -> str: ...

    def names(self) -> set[str]:
        """Of its files; empty where there is no folder."""
        ...

    def create(self, name: str = "") -> AbstractContextManager[New]:
        """A file to be written; it is there under its name, which may be set until then, when the
        context is left, and not there at all when it is left by an error.
        """
        ...

    def local(self, name: str) -> AbstractContextManager[Path]:
        """A context with the path of a copy on this machine, or of the file itself."""
        ...

    def ranges(self, wanted: Sequence[Range]) -> list[NDArray[np.uint8]]:
        """Pieces of files, in this order; views of the mapped files where they are here.

        Raises:
            DataError: a file is missing or shorter than that.
        """
        ...

    def below(self, name: str) -> Folder:
        """A folder in this one."""
        ...

    def remove(self) -> None:
        """All its files, and itself."""
        ...


def open_folder(where: Path | str) -> Folder:
    """The folder of a path, or of a URL such as s3://bucket/folder.

    Raises:
        ConfigError: it is a URL of another kind.
    """
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return LocalFolder(Path(where))
    if not _URL.match(text):
        raise ConfigError(
            "address of a folder", got=text, allowed="s3://bucket/folder, gs://… or az://…"
        )
    return ObjectFolder(text.rstrip("/"))


class LocalFolder:
    """A folder of this machine; what is read of a file is mapped, not copied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def __reduce__(self) -> tuple[type[LocalFolder], tuple[Path]]:
        return LocalFolder, (self.path,)  # maps stay behind

    @property
    def url(self) -> str:
        return str(self.path)

    def names(self) -> set[str]:
        if not self.path.is_dir():
            return set()
        return {p.name for p in self.path.iterdir() if p.suffix != ".partial"}

    @contextmanager
    def create(self, name: str = "") -> Iterator[New]:
        self.path.mkdir(parents=True, exist_ok=True)
        # A name of its own: two processes may be at it when a machine was thought lost.
        new = New(self.path / f"{uuid.uuid4().hex}.partial", name)
        try:
            yield new
            new.path.replace(self.path / new.name)
        finally:
            new.path.unlink(missing_ok=True)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self.path / name

    def ranges(self, wanted: Sequence[Range]) -> list[NDArray[np.uint8]]:
        return [self._range(*one) for one in wanted]

    def _range(self, name: str, first: int, count: int) -> NDArray[np.uint8]:
        mapped = self._maps.get(name)
        if mapped is None:
            try:
                mapped = np.memmap(self.path / name, np.uint8, "r").view(np.ndarray)
            except (OSError, ValueError) as error:  # ValueError: it is empty
                raise _unreadable(f"{self.path / name}", error) from error
            self._maps[name] = mapped
        piece = mapped[first : first + count]
        if len(piece) != count:
            raise _unreadable(f"{self.path / name}", f"{len(mapped)} bytes")
        return piece

    def below(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class ObjectFolder:
    """A prefix of a bucket; files are read by range, many at once."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __reduce__(self) -> tuple[type[ObjectFolder], tuple[str]]:
        return ObjectFolder, (self.url,)

    @cached_property
    def _store(self) -> Any:
        plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        return obstore.store.from_url(self.url, client_options={"allow_http": plain})

    def names(self) -> set[str]:
        with self._told():
            found = obstore.list_with_delimiter(self._store)["objects"]
        return {str(one["path"]) for one in found}

    @contextmanager
    def create(self, name: str = "") -> Iterator[New]:
        with tempfile.TemporaryDirectory(prefix="mm-put-") as folder:
            new = New(Path(folder) / "content", name)
            yield new
            with self._told(new.name):
                obstore.put(self._store, new.name, new.path, chunk_size=_PIECE_BYTES)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="mm-get-") as folder:
            path = Path(folder) / name
            with self._told(name), path.open("wb") as stream:
                for piece in obstore.get(self._store, name).stream(_PIECE_BYTES):
                    stream.write(piece)
            yield path

    def ranges(self, wanted: Sequence[Range]) -> list[NDArray[np.uint8]]:
        by_name: dict[str, list[int]] = {}
        for at, (name, _, _) in enumerate(wanted):
            by_name.setdefault(name, []).append(at)
        found: list[Any] = [None] * len(wanted)

        def fetch(name: str) -> None:
            mine = by_name[name]
            with self._told(name):
                pieces = obstore.get_ranges(
                    self._store,
                    name,
                    starts=[wanted[at][1] for at in mine],
                    lengths=[wanted[at][2] for at in mine],
                )
            for at, piece in zip(mine, pieces, strict=True):
                if len(piece) != wanted[at][2]:
                    raise _unreadable(f"{self.url}/{name}", "an end before it was due")
                found[at] = np.frombuffer(memoryview(piece), np.uint8)

        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="ranges") as threads:
            list(threads.map(fetch, by_name))
        return found

    def below(self, name: str) -> ObjectFolder:
        return ObjectFolder(f"{self.url}/{name}")

    def remove(self) -> None:
        names = sorted(self.names())
        with self._told():
            for first in range(0, len(names), 1000):
                obstore.delete(self._store, names[first : first + 1000])

    @contextmanager
    def _told(self, name: str = "") -> Iterator[None]:
        """Errors of the client as ours."""
        where = f"{self.url}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise _unreadable(where, "nothing there") from error
        except (BaseError, OSError) as error:
            raise ServiceError(
                f"{where}: object storage",
                got=" ".join(str(error).split())[:300],
                remedy="see to its address, credentials and network, then run it again: what was "
                "made is kept",
            ) from error


VSIS3 = Path("/vsis3")  # what GDAL calls the root of all buckets


def raster_root(url: str) -> Path:
    """The folder of a URL as GDAL names it; raises ConfigError for what is none of s3://."""
    if not url.startswith("s3://"):
        raise ConfigError("address of rasters", got=url, allowed="a folder, or s3://bucket/folder")
    return VSIS3 / url.removeprefix("s3://")


def stat(path: Path) -> tuple[int, str]:
    """Size of a file in bytes, and what changes whenever its content does (time, or ETag).

    Raises:
        FileNotFoundError: there is none.
        ServiceError: object storage does not answer.
    """
    if not path.is_relative_to(VSIS3):
        status = path.stat()
        return status.st_size, str(status.st_mtime_ns)
    bucket, *key = path.relative_to(VSIS3).parts
    folder = ObjectFolder(f"s3://{bucket}")
    try:
        with folder._told("/".join(key)):
            found = obstore.head(folder._store, "/".join(key))
    except DataError:
        raise FileNotFoundError(str(path)) from None
    return int(found["size"]), str(found["e_tag"])


def gdal_options(path: Path) -> dict[str, Any]:
    """What GDAL has to know beside credentials, which it takes from the environment itself."""
    if not path.is_relative_to(VSIS3):
        return {}
    # No side files, no listing, and nothing kept by address once a file is closed: it may change.
    options = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "CPL_VSIL_CURL_NON_CACHED": "/vsis3/"}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        scheme, _, host = endpoint.rstrip("/").partition("://")
        options |= {"AWS_S3_ENDPOINT": host, "AWS_HTTPS": "YES" if scheme == "https" else "NO"}
        options |= {"AWS_VIRTUAL_HOSTING": "FALSE"}
    return options


def _unreadable(where: str, got: object) -> DataError:
    return DataError(f"{where} cannot be read", got=got, remedy="run the stage prepare again")
