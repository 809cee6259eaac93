"""What a patch from a catalogue costs, beside the whole files: bytes, requests, time.

A scene as large as a tile of Sentinel-2, with real texture where real rasters are, is served with
the latency of a distant server.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine

from benchmarks import record
from mm_model.data.georeference import transform_xy
from mm_model.data.sources.stac.source import StacSource
from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import render
from mm_model.geo.grid import Grid
from mm_model.modalities import select

sys.path.insert(0, str(record.ROOT / "tests" / "unit" / "data"))
import stac_fixtures
from stac_server import StacServer

LATENCY_S = 0.05
PATCH_PX = 64
TILE = Grid("EPSG:32633", (10.0, 0.0, 499_980.0, 0.0, -10.0, 5_300_040.0), 10_980, 10_980)
DATA = Path(os.environ.get("MM_REAL_DATA", record.ROOT.parent / "shared" / "data"))
BANDS = ("B04", "B03", "B02", "B08")
SIDES_M = (640, 2560, 5120, 10240)
PLACES = 3


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Each block size in a folder that is gone afterwards."""
    figures: dict[str, float] = {}
    texture, about = _texture()
    for block in (512, 1024):
        with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
            figures |= _measure(Path(folder), texture, block)
    notes = {
        "": f"Layers rgb and nir of a tile of 10980 x 10980 px with its scene classification "
        f"({about}); patches of {PATCH_PX} px at 10 m, each answer {LATENCY_S * 1e3:g} ms late. "
        "`side` is search.yaml's side_m, `block` the side of the files' blocks in px.",
        "block_512_whole_files_mb": "the five files, as who has no windows fetches them",
        "block_512_side_2560_mb_per_place": "search and clouds included; 16 patches",
    }
    return figures, notes


def _measure(folder: Path, texture: NDArray[np.uint16], block: int) -> dict[str, float]:
    files = folder / "files"
    item = _write_tile(files, texture, block)
    whole = sum(path.stat().st_size for path in files.rglob("*.tif"))
    figures = {f"block_{block}_whole_files_mb": whole / 1e6}
    for side in SIDES_M:
        # A server of its own, so that nothing is left of what was read before.
        with StacServer(files, [item], latency_s=LATENCY_S) as server:
            made = _source(folder / str(side), server, side)
            began = time.perf_counter()
            count = sum(1 for unit in made.units() for _ in made.read(unit))
            seconds = time.perf_counter() - began
        sent = sum(a.sent for a in server.asked)
        name = f"block_{block}_side_{side}"
        figures |= {
            f"{name}_kb_per_patch": sent / 1e3 / count,
            f"{name}_requests_per_patch": len(server.asked) / count,
            f"{name}_ms_per_patch": seconds * 1e3 / count,
            f"{name}_mb_per_place": sent / 1e6 / PLACES,
        }
    return figures


def _source(folder: Path, server: StacServer, side_m: int) -> StacSource:
    rng = np.random.default_rng(side_m)
    places = {}
    for index in range(PLACES):
        row, col = rng.uniform(1500, 9500, 2)
        x, y = TILE.xy(row, col)
        (lon,), (lat,) = transform_xy(TILE.crs, "EPSG:4326", [x], [y])
        places[f"p{index}"] = [lon, lat]
    stac_fixtures.write_search(folder, server, places=places, side_m=float(side_m))
    return StacSource(folder, PATCH_PX, 10.0, select(("rgb", "nir")))


def _texture() -> tuple[NDArray[np.uint16], str]:
    """Four bands [4, H, W] as stored, and where they are from."""
    folder = DATA / "majortom_s2_sample" / "199U_1099R"
    if folder.is_dir():
        parts = []
        for name in ("rgb.tif", "nir.tif"):
            with rasterio.open(folder / name, driver="GTiff") as dataset:
                parts.append(dataset.read())
        return np.concatenate(parts) + np.uint16(1000), "1068 x 1068 px of a real one, mirrored"
    grid = TILE.window(0, 0, 1068, 1068)
    modalities = select(("rgb", "nir"))
    layers = render(7, grid, modalities, Acquisition.draw(0))
    values = np.concatenate([layers[m.name].values for m in modalities])
    return np.round(values * 1e4 + 1000).astype(np.uint16), "1068 x 1068 px rendered, mirrored"


def _write_tile(folder: Path, texture: NDArray[np.uint16], block: int) -> dict[str, Any]:
    more = TILE.height - texture.shape[1]
    for values, band in zip(texture, BANDS, strict=True):
        _write(
            folder / f"{band}.tif", np.pad(values, ((0, more), (0, more)), "symmetric"), TILE, block
        )
    classes = np.where(texture[3] > np.median(texture[3]), 4, 5).astype(np.uint8)[::2, ::2]
    more = TILE.height // 2 - classes.shape[0]
    classes = np.pad(classes, ((0, more), (0, more)), "symmetric")
    _write(folder / "SCL.tif", classes, TILE.coarser(2), block)
    files = {name: (f"{name}.tif", {}) for name in (*BANDS, "SCL")}
    properties = {"eo:cloud_cover": 1.0, "s2:processing_baseline": "05.00"}
    return stac_fixtures.item("sentinel-2-l2a", "tile", "2021-06-21", files, TILE, **properties)


def _write(path: Path, values: NDArray[Any], grid: Grid, block: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="COG", count=1, height=grid.height, width=grid.width, dtype=values.dtype,
        crs=grid.crs, transform=Affine(*grid.transform), nodata=0, compress="deflate",
        predictor="yes", blocksize=block,
    ) as dataset:  # fmt: skip
        dataset.write(values, 1)
