"""`dvc push` and `dvc pull` of 100,000 patches, and of as many files as a million would have.

The server is moto's, on loopback: it is real S3 to its clients, and slow. What DVC itself takes is
its CPU time; what it sends is counted in the bucket.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.data_many import PATCHES, PATCHES_PER_UNIT, dvc, pipeline

MILLION_OVER_MANY = 1_000_000 // PATCHES[-1]
SMALL_BYTES = 1_000


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Of the pipeline of `many` at its largest."""
    sys.path.insert(0, str(record.ROOT / "tests" / "integration"))
    from object_storage import objects, s3_server

    environment_before = dict(os.environ)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    figures: dict[str, float] = {}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="mm-bench-") as name,
            s3_server(port, "many", "million") as (environment, client),
        ):
            os.environ.update(environment)
            folder = Path(name) / "writer"
            folder.mkdir()
            files = _share_patches(folder, Path(name) / "reader", client, objects, figures)
            _share_small_files(Path(name) / "million", MILLION_OVER_MANY * files, figures)
    finally:
        os.environ.clear()
        os.environ.update(environment_before)
    return figures, {
        "": "To and from moto's server on loopback; `_cpu_s` is that of DVC, without the server's.",
        "push_100k_s": "everything that the pipeline made, into an empty bucket",
        "push_noop_100k_s": "when the bucket has everything",
        "push_add_one_unit_100k_s": f"{PATCHES_PER_UNIT} patches more were prepared before",
        "pull_100k_s": "into a folder that has dvc.yaml, dvc.lock and params.yaml alone",
        "pull_100k_equal": "1: every file of the store has the sha256 of the one that was pushed",
        "push_million_files": f"of {SMALL_BYTES} bytes: as many as a million patches would leave "
        f"({MILLION_OVER_MANY} times those of 100,000)",
    }


def _share_patches(
    folder: Path, reader: Path, client: Any, objects: Any, figures: dict[str, float]
) -> int:
    """Files of the store."""

    def push(what: str) -> None:
        before = objects(client, "many")
        seconds, cpu = dvc(folder, "push")
        new = {k: size for k, (*_, size) in objects(client, "many").items() if k not in before}
        figures.update(
            {
                f"push{what}_100k_s": seconds,
                f"push{what}_100k_cpu_s": cpu,
                f"push{what}_100k_objects": len(new),
                f"push{what}_100k_mb": sum(new.values()) / 1e6,
            }
        )
        print(what, {k: v for k, v in figures.items() if k.startswith(f"push{what}_100k")})

    pipeline(folder, PATCHES[-1])
    dvc(folder, "remote", "add", "-d", "there", "s3://many/dvc")
    dvc(folder, "remote", "modify", "there", "endpointurl", os.environ["AWS_ENDPOINT_URL"])
    dvc(folder, "repro")
    push("")
    push("_noop")
    pipeline(folder, PATCHES[-1] + PATCHES_PER_UNIT)
    dvc(folder, "repro")
    push("_add_one_unit")

    (reader / ".dvc").mkdir(parents=True)
    for name in (".dvc/config", "dvc.yaml", "dvc.lock", "params.yaml", "many.yaml"):
        shutil.copy(folder / name, reader / name)
    seconds, cpu = dvc(reader, "pull")
    sent, came = (_hashes(f / "data/patches") for f in (folder, reader))
    figures |= {
        "pull_100k_s": seconds,
        "pull_100k_cpu_s": cpu,
        "pull_100k_files": len(came),
        "pull_100k_equal": float(sent == came),
    }
    return len(came)


def _share_small_files(folder: Path, files: int, figures: dict[str, float]) -> None:
    """What grows with the number of files, not with their bytes."""
    (folder / "patches").mkdir(parents=True)
    for i in range(files):
        (folder / "patches" / f"{i:06d}.arrow").write_bytes(
            i.to_bytes(4, "big") * (SMALL_BYTES // 4)
        )
    dvc(folder, "init", "--no-scm")
    dvc(folder, "remote", "add", "-d", "there", "s3://million/dvc")
    dvc(folder, "remote", "modify", "there", "endpointurl", os.environ["AWS_ENDPOINT_URL"])
    dvc(folder, "add", "patches")
    figures["push_million_files"] = files
    for what in ("", "_noop"):
        seconds, cpu = dvc(folder, "push")
        figures |= {f"push{what}_million_files_s": seconds, f"push{what}_million_files_cpu_s": cpu}


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
