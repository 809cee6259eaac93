"""A Ray to work on: the one that is there, or one that ends with the work."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_model.adapters import environment

_SCRATCH = "mm-work-"


@contextmanager
def cluster(cpus: int) -> Iterator[None]:
    """The supervised cluster if it answers, else one of our own for as long as it is needed.

    Args:
        cpus: that one of our own has at least, whatever this machine has.
    """
    environment.enter()
    _ensure_token()
    import ray

    scratch: str | None = None
    # Ray leaves no process behind if it is shut down; SIGTERM (a cancelled flow) has to do it too.
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if _answers(environment.ray_address()):
            ray.init(address=environment.ray_address(), log_to_driver=False)
        else:
            # Short, since Ray puts sockets below it whose paths may not exceed 107 bytes.
            _drop_stale_scratch()
            scratch = tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir="/tmp")
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, cpus),
                include_dashboard=False,
                logging_level=logging.WARNING,
                # Its own, though none is started: else a dashboard of another Ray at the default
                # port is asked about our workers, knows none, and has them killed.
                dashboard_port=_free_port(),
                object_store_memory=128 * 2**20,
                log_to_driver=False,
                _temp_dir=scratch,
            )
        yield
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, previous)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _ensure_token() -> None:
    """Ray's shared secret, made by whoever needs it first."""
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))


def _drop_stale_scratch() -> None:
    """Remove what drivers of ours that were killed hard have left."""
    for folder in Path("/tmp").glob(f"{_SCRATCH}*"):
        pid = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if folder.stat().st_uid == os.getuid() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
