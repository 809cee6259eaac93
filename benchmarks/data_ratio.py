"""Preparation beside what rasterio alone takes to read and warp the same files, in CPU time.

Side by side, since the machine may be busy, and piece by piece: what is reading and warping, and
what are the checks that GDAL does not do.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.enums import Resampling
from rasterio.warp import reproject
from threadpoolctl import threadpool_limits

from benchmarks import record, setting
from mm_model.config import Params
from mm_model.data.alignment import align
from mm_model.data.georeference import source_pixels_per_target
from mm_model.data.prepare import prepare
from mm_model.data.raster import write_geotiff
from mm_model.data.shards import stored_layers
from mm_model.data.sources.geotiff import GeotiffSource, _bands, _scene_grid
from mm_model.data.sources.manifest import SceneSpec, load_manifest
from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import CRS, render
from mm_model.errors import ConfigError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES

TURNS = 3


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Medians over the turns of ratios within a turn."""
    chosen = setting.params()
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        return _measure(chosen, Path(name))


def _measure(chosen: Params, folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    manifest = record.ROOT / "examples" / "real" / "manifest.yaml"
    try:
        scenes = load_manifest(manifest)
        about = f"real rasters of examples/real: {len(scenes)} scenes, few of which need a warp"
    except ConfigError:
        manifest = _render_files(chosen, folder)
        scenes = load_manifest(manifest)
        about = f"rendered rasters, since no real ones are here: {len(scenes)} scenes, all warped"
    gsd_m = chosen.prepare.gsd_m[0]
    source = GeotiffSource(manifest, chosen.prepare.patch_px, gsd_m, chosen.selected)
    targets = [_scene_grid(scene, scene.gsd_m or gsd_m) for scene in scenes]
    by_name = {m.name: m for m in chosen.selected}
    patches = [p for unit in source.units() for p in source.read(unit)]
    alignment = chosen.prepare.alignment

    def gdal() -> int:
        return sum(_read_and_warp(s, t) for s, t in zip(scenes, targets, strict=True))

    def whole(measures_shifts: bool) -> None:
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        prepare(
            source,
            folder / "prepared",
            chosen.selected,
            shard_patches=chosen.prepare.shard_patches,
            min_valid_fraction=chosen.prepare.min_valid_fraction,
            alignment=alignment if measures_shifts else None,
        )

    sides: dict[str, Callable[[], object]] = {
        "gdal": gdal,
        "prepare": lambda: whole(True),
        "prepare_without_alignment": lambda: whole(False),
        "read_and_warp": lambda: [p for unit in source.units() for p in source.read(unit)],
        "alignment": lambda: [align(p, chosen.selected, alignment) for p in patches if p.layers],
        "content_and_hash": lambda: [stored_layers(p, by_name) for p in patches],
    }
    seconds = _cpu_turns(sides)
    rest = [
        whole - read - content
        for whole, read, content in zip(
            *(
                seconds[k]
                for k in ("prepare_without_alignment", "read_and_warp", "content_and_hash")
            ),
            strict=True,
        )
    ]
    decoded = gdal() / 1e6
    figures = {
        "prepare_time_over_gdal_ratio": setting.ratio(seconds, "prepare", "gdal"),
        "prepare_without_alignment_time_over_gdal_ratio": setting.ratio(
            seconds, "prepare_without_alignment", "gdal"
        ),
        "read_and_warp_time_over_gdal_ratio": setting.ratio(seconds, "read_and_warp", "gdal"),
        "alignment_time_over_gdal_ratio": setting.ratio(seconds, "alignment", "gdal"),
        "content_and_hash_time_over_gdal_ratio": setting.ratio(seconds, "content_and_hash", "gdal"),
        "parts_shards_index_time_over_gdal_ratio": setting.ratio(
            {**seconds, "rest": rest}, "rest", "gdal"
        ),
        "prepare_mb_per_cpu_s": decoded / statistics.median(seconds["prepare"]),
        "gdal_mb_per_cpu_s": decoded / statistics.median(seconds["gdal"]),
        "prepare_cpu_ms_per_patch": 1e3 * statistics.median(seconds["prepare"]) / len(patches),
    }
    notes = {
        "": f"CPU time of one process, {TURNS} turns; {about}; {len(patches)} patches of "
        f"{chosen.prepare.patch_px} px.",
        "prepare_time_over_gdal_ratio": "the whole stage: read, warp, measure, check, store",
        "prepare_without_alignment_time_over_gdal_ratio": "without measuring shifts",
        "read_and_warp_time_over_gdal_ratio": "what GDAL does as well, with masks, physical units "
        "and the check of ranges",
        "alignment_time_over_gdal_ratio": "the shift of each layer: GDAL has no such thing",
        "content_and_hash_time_over_gdal_ratio": "statistics, look and sha256 of each layer",
        "parts_shards_index_time_over_gdal_ratio": "written, read and written once more; outlines",
        "gdal_mb_per_cpu_s": "rasterio alone: the same bands read, and warped where grids differ",
    }
    return figures, notes


def _cpu_turns(sides: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of each call, the sides in turn; all files have been read before."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, side in sides.items():
            # One thread, as preparation itself takes: two that wait for each other count twice.
            with threadpool_limits(limits=1, user_api="blas"):
                began = time.process_time()
                side()
                seconds[name].append(time.process_time() - began)
    return seconds


def _read_and_warp(scene: SceneSpec, target: Grid) -> int:
    """What rasterio alone does with a scene's files; the number of bytes that it decoded."""
    decoded = 0
    for name, entry in scene.layers.items():
        modality = MODALITIES[name]
        files: dict[str, list[Any]] = {}
        for file, band in _bands(entry):
            files.setdefault(file, []).append(band)
        for file, bands in files.items():
            with rasterio.open(scene.folder / file, driver="GTiff") as dataset:
                names = list(dataset.descriptions)
                numbers = [names.index(b) + 1 if isinstance(b, str) else b for b in bands]
                values = dataset.read(None if numbers == [None] else numbers)
                transform, crs = dataset.transform, dataset.crs
            decoded += values.nbytes
            grid = Grid(target.crs, tuple(transform)[:6], *values.shape[1:])
            if tuple(transform)[:6] == target.transform and grid.shape == target.shape:
                continue
            several = source_pixels_per_target(Grid(crs.to_wkt(), *_rest(grid)), target) > 1.5
            kinds = (
                (Resampling.nearest, Resampling.mode)
                if modality.is_categorical
                else (Resampling.bilinear, Resampling.average)
            )
            out = np.zeros((len(values), *target.shape), values.dtype)
            reproject(
                values,
                out,
                src_transform=transform,
                src_crs=crs,
                dst_transform=rasterio.Affine(*target.transform),
                dst_crs=target.crs,
                resampling=kinds[several],
            )
    return decoded


def _rest(grid: Grid) -> tuple[Any, int, int]:
    return grid.transform, grid.height, grid.width


def _render_files(chosen: Params, folder: Path) -> Path:
    """GeoTIFFs of the synthetic Earth, and a manifest that wants them in the next UTM zone."""
    scenes = {}
    when = date(2021, 7, 1)
    for index in range(4):
        name, side = f"scene{index}", 768
        grid = Grid(
            CRS, (10.0, 0.0, 620_000.0 + 9_000 * index, 0.0, -10.0, 5_300_000.0), side, side
        )
        layers = render(7, grid, chosen.selected, Acquisition.draw(index))
        (folder / name).mkdir()
        for modality in chosen.selected:
            layer = layers[modality.name]
            path = folder / name / f"{modality.name}.tif"
            write_geotiff(path, layer.values, layer.valid, grid, modality)
        scenes[name] = {"date": when.isoformat()}
    entries: dict[str, dict[str, Any]] = {}
    for modality in chosen.selected:
        entries[modality.name] = {"file": f"{modality.name}.tif", "unit": modality.unit}
        if modality.is_categorical:
            entries[modality.name]["classes"] = {c: c for c in modality.class_codes}
    source = {
        "licence": "none needed",
        "folder": "{scene}",
        "grid": chosen.selected[0].name,
        "crs": "EPSG:32634",
        "layers": entries,
        "scenes": scenes,
    }
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"root": ".", "sources": {"rendered": source}}))
    return manifest
