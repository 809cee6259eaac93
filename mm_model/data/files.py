"""Files that are either whole or absent, whenever the process dies or the disk is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm_model.errors import StorageError

# The disk, somebody's share of it, and what one file may hold.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def needs_room(what: str) -> Iterator[None]:
    """Where the disk is full, a StorageError says what there is no room for."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise StorageError(
            f"there is no room for {what}",
            got=os.strerror(error.errno),
            remedy="make room on the disk, then try again",
        ) from error


def check_room(path: Path, what: str, more_bytes: int = 2**20) -> None:
    """Raise StorageError if a file cannot grow by so much; it stays as it is.

    For libraries that do not say why they could not write, or not even that.
    """
    with suppress(OSError), needs_room(what), path.open("ab") as file:
        size = file.tell()
        try:
            os.posix_fallocate(file.fileno(), size, more_bytes)
        finally:
            file.truncate(size)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with needs_room(path.name), partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def prune(folder: Path, max_bytes: int) -> None:
    """Remove the files of a folder that were written to longest ago, until the rest is no more."""
    found = []
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # others prune, too
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    kept = 0
    for _, size, path in sorted(found, reverse=True):
        kept += size
        if kept > max_bytes:
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Force a folder's files and its list of names to disk, before it is renamed into place."""
    for path in [*sorted(folder.iterdir()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
