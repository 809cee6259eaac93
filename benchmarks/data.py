"""Synthetic patches, preparation beside plain GDAL, and the store beside the page cache."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.enums import Resampling
from rasterio.warp import reproject

from benchmarks import record, setting
from mm_model.config import Params
from mm_model.data.georeference import source_pixels_per_target
from mm_model.data.prepare import prepare
from mm_model.data.raster import write_geotiff
from mm_model.data.sources.geotiff import GeotiffSource, _bands, _scene_grid
from mm_model.data.sources.manifest import SceneSpec, load_manifest
from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import CRS, render
from mm_model.errors import ConfigError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES

PLACES = 8
STORE_PLACES = 16


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Each part in a folder that is gone afterwards."""
    chosen = setting.params()
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
        figures = _synthetic(chosen)
        prepared, about = _prepare(chosen, Path(folder))
        figures |= prepared | _store(chosen, Path(folder))
    notes = {
        "": f"Patches of {chosen.prepare.patch_px} px with {len(chosen.selected)} modalities.",
        "synthetic_patches_per_s_core": "process bound to one core; median over places",
        "prepare_mb_per_s": "decoded pixels of the files, whole stage: read, warp, check, store",
        "gdal_mb_per_s": "rasterio alone: the same bands read, and warped where grids differ",
        "prepare_time_over_gdal_ratio": about,
        "store_random_patches_per_s": "all layers, values and masks, copied out, in random order",
        "store_share_of_page_cache": "time of copying the same mapped bytes, over ours",
    }
    return figures, notes


def _synthetic(chosen: Params) -> dict[str, float]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        source = setting.synthetic_source(chosen, PLACES + 1)
        rates = []
        for unit in source.units():
            began = time.perf_counter()
            count = sum(1 for _ in source.read(unit))
            rates.append(count / (time.perf_counter() - began))
    finally:
        os.sched_setaffinity(0, allowed)
    return {"synthetic_patches_per_s_core": statistics.median(rates[1:])}


def _prepare(chosen: Params, folder: Path) -> tuple[dict[str, float], str]:
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

    def ours() -> None:
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        prepare(
            source,
            folder / "prepared",
            chosen.selected,
            shard_patches=chosen.prepare.shard_patches,
            min_valid_fraction=chosen.prepare.min_valid_fraction,
            alignment=chosen.prepare.alignment,
        )

    targets = [_scene_grid(scene, scene.gsd_m or gsd_m) for scene in scenes]
    decoded = 0

    def bare() -> None:
        nonlocal decoded
        decoded = sum(
            _read_and_warp(scene, target) for scene, target in zip(scenes, targets, strict=True)
        )

    seconds = setting.take_turns({"prepare": ours, "gdal": bare}, repeats=3)
    figures = {
        "prepare_mb_per_s": decoded / 1e6 / statistics.median(seconds["prepare"]),
        "gdal_mb_per_s": decoded / 1e6 / statistics.median(seconds["gdal"]),
        "prepare_time_over_gdal_ratio": setting.ratio(seconds, "prepare", "gdal"),
    }
    return figures, about


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


def _store(chosen: Params, folder: Path) -> dict[str, float]:
    store = setting.make_store(chosen, folder / "patches", STORE_PLACES)
    order = np.random.default_rng(0).permutation(len(store)).tolist()
    # Views of the mapped files: no byte of them is read before it is copied.
    views = [[(n, y.values) for n, y in store.read(i).layers.items()] for i in range(len(store))]
    side = chosen.prepare.patch_px
    values = {m.name: np.empty((len(m.bands), side, side), m.dtype) for m in chosen.selected}
    valid = {m.name: np.empty((side, side), np.bool_) for m in chosen.selected}

    def ours() -> None:
        for position in order:
            for name, layer in store.read(position).layers.items():
                np.copyto(values[name], layer.values)
                np.copyto(valid[name], layer.valid)

    def bare() -> None:
        for position in order:
            for name, view in views[position]:
                np.copyto(values[name], view)

    seconds = setting.take_turns({"store": ours, "copy": bare}, repeats=9)
    megabytes = sum(view.nbytes for patch in views for _, view in patch) / 1e6
    return {
        "store_random_patches_per_s": len(store) / statistics.median(seconds["store"]),
        "store_random_mb_per_s": megabytes / statistics.median(seconds["store"]),
        "page_cache_patches_per_s": len(store) / statistics.median(seconds["copy"]),
        "store_share_of_page_cache": setting.ratio(seconds, "copy", "store"),
    }
