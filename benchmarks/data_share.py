"""`dvc push` and `dvc pull` of 100,000 patches, and of as many files as a million would have.

The server is moto's, on loopback: it is real S3 to its clients, and slow. What DVC itself takes is
its CPU time; what it sends is counted in the bucket.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data_many import PATCHES, PATCHES_PER_UNIT, dvc, pipeline
from benchmarks.data_storage import loopback_s3, sizes

MILLION_OVER_MANY = 1_000_000 // PATCHES[-1]
SMALL_BYTES = 1_000


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Of the pipeline of `many` at its largest."""
    with (
        tempfile.TemporaryDirectory(prefix="mm-bench-") as name,
        loopback_s3("many", "million") as client,
    ):
        figures = _patches(Path(name), client)
        files = MILLION_OVER_MANY * int(figures["pull_100k_files"])
        figures |= _small_files(Path(name) / "million", files)
    return figures, {
        "": "To and from moto's server on loopback; `_cpu_s` is that of DVC, without the server's.",
        "push_100k_s": "everything that the pipeline made, into an empty bucket",
        "push_noop_100k_s": "when the bucket has everything",
        "push_add_one_unit_100k_s": f"{PATCHES_PER_UNIT} patches more were prepared before",
        "pull_100k_s": "into a folder that has no more than Git would bring",
        "pull_100k_equal": "1: every file of the store has the sha256 of the one that was pushed",
        "push_million_files": f"of {SMALL_BYTES} bytes: as many as a million patches would leave "
        f"({MILLION_OVER_MANY} times those of 100,000)",
    }


def _patches(root: Path, client: Any) -> dict[str, float]:
    """One folder pushes, before and after a unit is added, another pulls."""
    folder, reader = root / "writer", root / "reader"
    folder.mkdir()
    figures: dict[str, float] = {}

    def push(what: str) -> None:
        before = sizes(client, "many")
        seconds, cpu = dvc(folder, "push")
        new = {key: size for key, size in sizes(client, "many").items() if key not in before}
        figures.update(
            {
                f"push{what}_100k_s": seconds,
                f"push{what}_100k_cpu_s": cpu,
                f"push{what}_100k_objects": len(new),
                f"push{what}_100k_mb": sum(new.values()) / 1e6,
            }
        )

    pipeline(folder, PATCHES[-1])
    _add_remote(folder, "many")
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
    return figures | {
        "pull_100k_s": seconds,
        "pull_100k_cpu_s": cpu,
        "pull_100k_files": len(came),
        "pull_100k_equal": float(sent == came),
    }


def _small_files(folder: Path, files: int) -> dict[str, float]:
    """What grows with the number of files, not with their bytes."""
    (folder / "patches").mkdir(parents=True)
    for i in range(files):
        (folder / "patches" / f"{i:06d}.arrow").write_bytes(
            i.to_bytes(4, "big") * (SMALL_BYTES // 4)
        )
    dvc(folder, "init", "--no-scm")
    _add_remote(folder, "million")
    dvc(folder, "add", "patches")
    figures: dict[str, float] = {"push_million_files": files}
    for what in ("", "_noop"):
        seconds, cpu = dvc(folder, "push")
        figures |= {f"push{what}_million_files_s": seconds, f"push{what}_million_files_cpu_s": cpu}
    return figures


def _add_remote(folder: Path, bucket: str) -> None:
    dvc(folder, "remote", "add", "-d", "there", f"s3://{bucket}/dvc")
    dvc(folder, "remote", "modify", "there", "endpointurl", os.environ["AWS_ENDPOINT_URL"])


def _hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
