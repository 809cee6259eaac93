"""Ten kills of preparation on the real rasters by two Ray workers, at random moments.

The whole process group dies each time: the stage, its workers and Ray's own processes.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks import record

KILLS, WORKERS = 10, 2


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Whether what is left at the end has the hashes of an undisturbed run."""
    with tempfile.TemporaryDirectory(prefix="mm-kills-", dir="/tmp") as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        took = _finish(whole)
        rng = random.Random(0)
        kills = with_parts = through = 0
        while kills < KILLS:
            process = _start(killed)
            time.sleep(rng.uniform(0, 1.2 * took))
            if process.poll() is not None:  # it was through: all over again
                through += 1
                shutil.rmtree(killed / "data")
                continue
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            with_parts += any((killed / "data").glob(".patches.*/*"))
        _finish(killed)
        same = _hashes(killed) == _hashes(whole)
        left = sorted(p.name for p in (killed / "data").iterdir())
        figures = {
            "kills": kills,
            "kills_with_work_half_done": with_parts,
            "kills_ended_in_the_same_hashes": float(same and left == ["patches"]),
            "kills_runs_that_were_through": through,
        }
    return figures, {
        "": f"SIGKILL to the process group of the stage, real rasters, {WORKERS} Ray workers.",
        "kills_ended_in_the_same_hashes": "1: every file as an undisturbed run leaves it, and "
        "nothing beside them",
    }


def _finish(folder: Path) -> float:
    began = time.monotonic()
    process = _start(folder)
    if process.wait():
        raise RuntimeError((folder / "log").read_text()[-2000:])
    return time.monotonic() - began


def _start(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    chosen = yaml.safe_load((record.ROOT / "examples/real/params.yaml").read_text())
    chosen["prepare"] |= {
        "workers": WORKERS,
        "shard_patches": 256,  # several chunks, so that kills hit those as well
        "geotiff": {"manifest": str(record.ROOT / "examples/real/manifest.yaml")},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(chosen))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "mm_model.stages.prepare"],
            cwd=folder,
            env={
                **os.environ,
                "RAY_ADDRESS": nobody,  # a Ray of its own
                "MM_PROJECT": str(folder),
                "PYTHONPATH": str(record.ROOT),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted((folder / "data/patches").iterdir())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
