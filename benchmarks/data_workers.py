"""Preparation by one Ray worker and by two.

It wants a machine that does nothing else, and is measured alone by `make bench-data PARTS=workers`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import record, setting
from mm_model.adapters.ray_cluster import cluster
from mm_model.adapters.ray_prepare import RayWorkers
from mm_model.config import Params
from mm_model.data.parts import Run
from mm_model.data.patch import Patch, Source, Unit
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource

COPIES = 12  # of the real rasters, so that there is work enough


@dataclass(frozen=True)
class Repeated:
    """A source whose units are there several times."""

    source: Source
    copies: int

    def units(self) -> Sequence[Unit]:
        return [
            Unit(f"{i}/{unit.unit_id}", unit.fingerprint)
            for i in range(self.copies)
            for unit in self.source.units()
        ]

    def read(self, unit: Unit) -> Iterator[Patch]:
        copy, _, name = unit.unit_id.partition("/")
        for patch in self.source.read(Unit(name, unit.fingerprint)):
            yield replace(patch, patch_id=f"{copy}/{patch.patch_id}")


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the wall clock, and what must be known of them."""
    chosen = setting.params()
    busy = record.machine()["load_1_min"]
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder, setting.temporary_project():
        figures = _by_workers(chosen, Path(folder))
    figures["load_before_workers"] = busy
    quiet = "" if busy < 0.5 else " THE MACHINE WAS BUSY: measure this part again on a quiet one."
    return figures, {
        "": f"Real rasters of examples/real, {COPIES} times over; Ray is started before the clock, "
        f"the workers are not.{quiet}",
        "prepare_speedup_2_workers": f"with a core for each; load before it {busy}.{quiet}",
    }


def _by_workers(chosen: Params, folder: Path) -> dict[str, float]:
    manifest = record.ROOT / "examples" / "real" / "manifest.yaml"
    gsd_m = chosen.prepare.gsd_m[0]
    bare = GeotiffSource(manifest, chosen.prepare.patch_px, gsd_m, chosen.selected)
    source = Repeated(bare, COPIES)
    figures = {}
    with cluster(2):
        for workers in (2, 1, 2):  # the first one warms the page cache
            shutil.rmtree(folder / "prepared", ignore_errors=True)
            began = time.perf_counter()
            count = _prepare(chosen, source, folder / "prepared", RayWorkers(workers))
            seconds = time.perf_counter() - began
            figures[f"workers_{workers}_seconds"] = seconds
            figures[f"workers_{workers}_patches_per_s"] = count / seconds
    figures["prepare_speedup_2_workers"] = (
        figures["workers_1_seconds"] / figures["workers_2_seconds"]
    )
    return figures


def _prepare(chosen: Params, source: Source, out: Path, run: Run) -> int:
    return prepare(
        source,
        out,
        chosen.selected,
        shard_patches=256,  # several chunks, as a larger set has
        min_valid_fraction=chosen.prepare.min_valid_fraction,
        alignment=chosen.prepare.alignment,
        run=run,
    )
