"""Preparation by number of workers beside plain GDAL, and its memory by number of patches.

`make bench-data`, or `python -m benchmarks.data_scale`; rasters are those of benchmarks/data.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data, record, setting
from mm_model.adapters.ray_cluster import cluster
from mm_model.adapters.ray_prepare import on_ray
from mm_model.config import Params
from mm_model.data.parts import Make, Run, Work, in_this_process
from mm_model.data.patch import Layer, Patch, Source, Unit
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource, _scene_grid
from mm_model.data.sources.manifest import load_manifest
from mm_model.geo.grid import Grid

COPIES = 4  # of the real rasters, so that there is work enough
PATCHES = (1_000, 10_000, 100_000)
SIDE_PX, PATCHES_PER_UNIT = 16, 50
_HERE = "benchmarks.data_scale"


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


@dataclass(frozen=True)
class Noise:
    """Patches that cost next to nothing, of every modality."""

    patches: int
    chosen: Params

    def units(self) -> Sequence[Unit]:
        return [Unit(f"{i:06d}", "1") for i in range(self.patches // PATCHES_PER_UNIT)]

    def read(self, unit: Unit) -> Iterator[Patch]:
        rng = np.random.default_rng(int(unit.unit_id))
        shape, valid = (SIDE_PX, SIDE_PX), np.ones((SIDE_PX, SIDE_PX), np.bool_)
        for i in range(PATCHES_PER_UNIT):
            layers = {}
            for modality in self.chosen.selected:
                size = (len(modality.bands), *shape)
                if modality.is_categorical:
                    values: Any = rng.choice(np.array(modality.class_codes, np.uint8), size)
                else:
                    values = rng.uniform(*modality.valid_range, size).astype(np.float32)
                layers[modality.name] = Layer(values, valid, "2020-06-01", modality.gsd_m)
            left, top = 500_000.0 + 160 * i, 1_000_000.0 + 160 * int(unit.unit_id)
            grid = Grid("EPSG:32633", (10.0, 0.0, left, 0.0, -10.0, top), *shape)
            yield Patch(f"{unit.unit_id}/{i}", unit.unit_id, "noise", grid, 10.0, layers)


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Figures, and what must be known of them."""
    chosen = setting.params()
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
        figures = _by_workers(chosen, Path(folder)) | _memory(Path(folder))
    return figures, {
        "": f"Real rasters of examples/real, {COPIES} times over. Workers are started before the "
        "clock, their interpreters are not; the time of joining is in.",
        "workers_2_over_1_speedup": "with a core for each, and one for the join: see the load",
        "no_alignment_time_over_gdal_ratio": "without measuring shifts, which GDAL does not either",
    }


def _by_workers(chosen: Params, folder: Path) -> dict[str, float]:
    manifest = record.ROOT / "examples" / "real" / "manifest.yaml"
    scenes = load_manifest(manifest)
    gsd_m = chosen.prepare.gsd_m[0]
    bare = GeotiffSource(manifest, chosen.prepare.patch_px, gsd_m, chosen.selected)
    source = Repeated(bare, COPIES)
    targets = [_scene_grid(scene, scene.gsd_m or gsd_m) for scene in scenes]

    def gdal() -> int:
        return COPIES * sum(
            data._read_and_warp(scene, target)
            for scene, target in zip(scenes, targets, strict=True)
        )

    def ours(run: Run, alignment: Any) -> tuple[float, int]:
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        began = time.perf_counter()
        count = prepare(
            source,
            folder / "prepared",
            chosen.selected,
            shard_patches=chosen.prepare.shard_patches,
            min_valid_fraction=chosen.prepare.min_valid_fraction,
            alignment=alignment,
            run=run,
        )
        return time.perf_counter() - began, count

    alignment = chosen.prepare.alignment
    gdal()
    began = time.perf_counter()
    megabytes = gdal() / 1e6
    bare_s = time.perf_counter() - began
    figures = {"gdal_mb_per_s": megabytes / bare_s}
    seconds, _ = ours(in_this_process, None)
    figures["no_alignment_time_over_gdal_ratio"] = seconds / bare_s

    def note(workers: int, seconds: float, count: int) -> None:
        figures[f"workers_{workers}_seconds"] = seconds
        figures[f"workers_{workers}_mb_per_s"] = megabytes / seconds
        figures[f"workers_{workers}_patches_per_s"] = count / seconds
        figures[f"workers_{workers}_time_over_gdal_ratio"] = seconds / bare_s

    note(0, *ours(in_this_process, alignment))
    # One project for both: Ray reads its token once in a process.
    with setting.temporary_project():
        for workers in (1, 2):
            with cluster(workers):
                note(workers, *ours(_on(workers), alignment))
    figures["workers_2_over_1_speedup"] = (
        figures["workers_1_seconds"] / figures["workers_2_seconds"]
    )
    return figures


def _on(workers: int) -> Run:
    def run(make: Make, works: Sequence[Work]) -> Iterator[Any]:
        yield from on_ray(make, works, workers)

    return run


def _memory(folder: Path) -> dict[str, float]:
    """Peak memory of a process that prepares so many patches, and that adds a unit to them."""
    figures = {}
    for patches in PATCHES:
        out = folder / f"noise{patches}"
        for more, name in ((0, "peak_mb"), (PATCHES_PER_UNIT, "adding_one_unit_peak_mb")):
            said = subprocess.run(
                [sys.executable, "-m", _HERE, str(patches + more), str(out)],
                check=True,
                capture_output=True,
                env={**os.environ, "PYTHONPATH": str(record.ROOT)},
            ).stdout
            figures[f"patches_{patches}_{name}"] = json.loads(said.splitlines()[-1])
        shutil.rmtree(out)
    return figures


def _prepare_noise(patches: int, out: Path) -> float:
    chosen = setting.params()
    prepare(
        Noise(patches, chosen),
        out,
        chosen.selected,
        shard_patches=chosen.prepare.shard_patches,
        min_valid_fraction=0,
        alignment=chosen.prepare.alignment,
    )
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM")]
    return int(peak) / 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_prepare_noise(int(sys.argv[1]), Path(sys.argv[2]))))
    else:
        (record.ROOT / "build").mkdir(exist_ok=True)
        figures, notes = measure()
        for key, value in figures.items():
            print(f"{key:48} {value:.4g}", flush=True)
        record.write("data_scale", figures, notes)
        record.write_page()
