"""`make demo` in a fresh clone: wall time with installation, and memory of all processes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks import record

SAMPLE_EVERY_S = 2.0


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Clone, `make demo`, `make demo` again, `make down`."""
    with tempfile.TemporaryDirectory(prefix="mm-demo-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(record.ROOT), str(clone)], check=True)
        # The clone must find its own virtual environment and services, not the caller's.
        environment = {
            key: value
            for key, value in os.environ.items()
            if not re.match(r"(MM_|MLFLOW_|PREFECT_|RAY_|DVC_|VIRTUAL_ENV$|PYTHON)", key)
        }
        peak = _Peak(clone)
        try:
            first_s = _timed(clone, environment, "demo")
            installed_s = _installation_seconds(clone)
            again_s = _timed(clone, environment, "demo")
        finally:
            down_s = _timed(clone, environment, "down")
            peak.stop()
        left = [p for p in psutil.process_iter(["cmdline"]) if _belongs(p, clone)]
    figures = {
        "demo_wall_s": first_s,
        "demo_install_s": installed_s,
        "demo_again_wall_s": again_s,
        "demo_down_s": down_s,
        "demo_peak_rss_mb": peak.rss_mb,
        "demo_peak_pss_mb": peak.pss_mb,
        "demo_processes_left": len(left),
    }
    notes = {
        "": "A clone in an empty folder, then `make demo` twice and `make down`.",
        "demo_wall_s": "installation included; packages come from a near index",
        "demo_again_wall_s": "nothing has changed: no stage runs",
        "demo_peak_rss_mb": "sum over all processes; shared pages are counted in each",
        "demo_peak_pss_mb": "sum over all processes; shared pages divided: what it takes",
    }
    return figures, notes


def _timed(clone: Path, environment: dict[str, str], target: str) -> float:
    start = time.monotonic()
    with (record.ROOT / "build" / f"bench-{target}.log").open("a") as log:
        subprocess.run(
            ["make", target], cwd=clone, env=environment, check=True, stdout=log, stderr=log
        )
    return time.monotonic() - start


def _installation_seconds(clone: Path) -> float:
    """From the folder's making to the stamp that `make setup` leaves last."""
    stamp = clone / ".venv" / "bin" / ".installed"
    return stamp.stat().st_mtime - (clone / ".venv" / "pyvenv.cfg").stat().st_mtime


def _belongs(process: psutil.Process, clone: Path) -> bool:
    try:
        return process.cwd().startswith(str(clone)) or any(
            str(clone) in part for part in process.cmdline()
        )
    except psutil.Error:
        return False


class _Peak:
    """Samples the memory of every process that belongs to a folder."""

    def __init__(self, clone: Path) -> None:
        self.rss_mb = self.pss_mb = 0.0
        self._clone = clone
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_EVERY_S):
            rss = pss = 0.0
            for process in psutil.process_iter():
                # Children of ours belong too, also where their command line does not say so (Ray).
                if not (_belongs(process, self._clone) or self._descends(process)):
                    continue
                try:
                    memory = process.memory_full_info()
                except psutil.Error:
                    continue
                rss, pss = rss + memory.rss / 1e6, pss + memory.pss / 1e6
            self.rss_mb, self.pss_mb = max(self.rss_mb, rss), max(self.pss_mb, pss)

    def _descends(self, process: psutil.Process) -> bool:
        try:
            return any(_belongs(parent, self._clone) for parent in process.parents())
        except psutil.Error:
            return False
