"""Known ground as catalogues serve it: COGs of the synthetic Earth in each product's numbers."""

from __future__ import annotations

import datetime as dt
import json
from functools import cache
from pathlib import Path

import numpy as np
import rasterio
import shapely
import yaml
from rasterio.transform import Affine
from shapely.geometry import mapping
from stac_server import StacServer

from mm_model.data.georeference import transform_xy
from mm_model.data.remote import Patience
from mm_model.data.sources.stac.request import LOCK_FILE, SEARCH_FILE, declared_products
from mm_model.data.sources.stac.source import StacSource
from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import render
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES

CRS, SEED, PATCH_PX, GSD_M, SIDE_M = "EPSG:32633", 5, 32, 10.0, 960.0
# A scene of 5.6 x 4.4 km, with Sentinel-2's pixels of 10 m; the place is 96 px in its middle.
SCENE = Grid(CRS, (10.0, 0.0, 500_040.0, 0.0, -10.0, 5_300_040.0), 440, 560)
PLACE = Grid(CRS, (10.0, 0.0, 502_020.0, 0.0, -10.0, 5_298_000.0), 96, 96)
UNIT = "here/2021-06-21"
HASTE = Patience(attempts=4, first_wait_s=0.02, timeout_s=5.0)
JUNE = Acquisition(dt.date(2021, 6, 21), seed=3)
OPTICAL = {"red": ("rgb", 0), "green": ("rgb", 1), "blue": ("rgb", 2), "nir": ("nir", 0)}
RED_EDGE = {
    "rededge1": "B05", "rededge2": "B06", "rededge3": "B07",
    "nir08": "B8A", "swir16": "B11", "swir22": "B12",
}  # fmt: skip
WORLDCOVER_CODES = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100], np.uint8)


def lonlat_of_place() -> tuple[float, float]:
    x, y = PLACE.xy(PLACE.height / 2, PLACE.width / 2)
    (lon,), (lat,) = transform_xy(CRS, "EPSG:4326", [x], [y])
    return lon, lat


@cache
def _rendered() -> dict[str, np.ndarray]:
    modalities = [MODALITIES[n] for n in ("rgb", "nir", "sar")]
    return {n: x.values for n, x in render(SEED, SCENE, modalities, JUNE).items()}


def truth(name: str) -> np.ndarray:
    """What the scene shows: [bands, H, W] in physical units."""
    return _rendered()[name].copy()


def window(values: np.ndarray, factor: int = 1) -> np.ndarray:
    """The place's part of an array on the scene's grid, or one coarser by `factor`."""
    row, col = (round(v / factor) for v in SCENE.row_col(*PLACE.xy(0, 0)))
    side = PLACE.height // factor
    return values[..., row : row + side, col : col + side]


def write_cog(path: Path, values: np.ndarray, grid: Grid, nodata: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = values if values.ndim == 3 else values[None]
    with rasterio.open(
        path, "w", driver="COG", count=len(values), height=grid.height, width=grid.width,
        dtype=values.dtype, crs=grid.crs, transform=Affine(*grid.transform), nodata=nodata,
        compress="deflate", blocksize=128,
    ) as dataset:  # fmt: skip
        dataset.write(values)


def footprint(grid: Grid) -> dict:
    corners = [grid.xy(r, c) for r, c in ((0, 0), (0, grid.width), grid.shape, (grid.height, 0))]
    xs, ys = transform_xy(grid.crs, "EPSG:4326", *zip(*corners, strict=True))
    return dict(mapping(shapely.Polygon(list(zip(xs, ys, strict=True)))))


def item(collection, name, date, files, grid=SCENE, **properties) -> dict:
    """A STAC item whose assets lie under /files/."""
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": collection,
        "geometry": footprint(grid),
        "properties": {"datetime": f"{date}T10:30:00+00:00", **properties},
        "links": [],
        "assets": {
            key: {"href": f"{{base}}/files/{file}", **more} for key, (file, more) in files.items()
        },
    }  # fmt: skip


def sentinel2(
    folder, name, date, *, added=1000, baseline="05.00", cloud=5.0, covered=None, **properties
):
    """An item of Sentinel-2 with `added` in its numbers; `covered` is a window of the place."""
    for band, (modality, index) in OPTICAL.items():
        stored = np.round(truth(modality)[index] / 1e-4).astype("int32") + added
        stored = np.clip(stored, 1, 65535).astype("uint16")
        stored[:, :20] = 0  # beyond the swath
        write_cog(folder / name / f"{band}.tif", stored, SCENE, nodata=0)
    rest = np.arange(6)[:, None, None] * 1000 + 500 + added  # of 20 m: one number a band
    for band, numbers in zip(RED_EDGE, rest, strict=True):
        coarse = SCENE.coarser(2)
        write_cog(
            folder / name / f"{band}.tif",
            np.full(coarse.shape, numbers, "uint16"),
            coarse,
            nodata=0,
        )
    scl = np.full((SCENE.height // 2, SCENE.width // 2), 4, "uint8")
    if covered is not None:
        rows, cols, code = covered
        window(scl, 2)[rows, cols] = code
    write_cog(folder / name / "scl.tif", scl, SCENE.coarser(2), nodata=0)
    names = {"red": "B04", "green": "B03", "blue": "B02", "nir": "B08", "scl": "SCL", **RED_EDGE}
    files = {key: (f"{name}/{b}.tif", {}) for b, both in names.items() for key in (both, b)}
    if baseline is not None:
        properties["s2:processing_baseline"] = baseline
    return item("sentinel-2-l2a", name, date, files, **{"eo:cloud_cover": cloud}, **properties)


def sentinel1(folder, name, date, mode="IW"):
    decibels = truth("sar")
    power = np.power(10.0, decibels / 10).astype("float32")
    power[:, window_rows(8)] = -32768.0
    for index, band in enumerate(("vv", "vh")):
        write_cog(folder / name / f"{band}.tif", power[index], SCENE, nodata=-32768.0)
    files = {b: (f"{name}/{b}.tif", {}) for b in ("vv", "vh")}
    return item("sentinel-1-rtc", name, date, files, **{"sar:instrument_mode": mode})


def window_rows(count: int) -> slice:
    row = round(SCENE.row_col(*PLACE.xy(0, 0))[0])
    return slice(row, row + count)


def degrees(step: float, margin: float = 0.05, west: float | None = None) -> Grid:
    """A grid in degrees around the place, or beginning at `west`."""
    lon, lat = lonlat_of_place()
    left = lon - margin if west is None else west
    size = round(2 * margin / step)
    return Grid("EPSG:4326", (step, 0.0, left, 0.0, -step, lat + margin), size, size)


def plane(lon, lat):
    """Elevation that is linear in degrees, so that interpolation makes no error."""
    return 500.0 + 2000.0 * (np.asarray(lon) - 15.0) - 3000.0 * (np.asarray(lat) - 47.8)


def elevation(folder, name, grid):
    cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    lon, lat = grid.xy(rows, cols)
    write_cog(folder / f"{name}.tif", plane(lon, lat).astype("float32"), grid)
    return item("cop-dem-glo-30", name, "2021-04-22", {"data": (f"{name}.tif", {})}, grid)


def cover(folder, name, grid, version="2.0.0"):
    rows, cols = np.mgrid[: grid.height, : grid.width] // 7
    codes = WORLDCOVER_CODES[(rows * 3 + cols * 5) % len(WORLDCOVER_CODES)]
    write_cog(folder / f"{name}.tif", codes, grid, nodata=0)
    files = {"map": (f"{name}.tif", {})}
    return item(
        "esa-worldcover", name, "2021-01-01", files, grid,
        **{"esa_worldcover:product_version": version},
    ), codes  # fmt: skip


def landsat(folder, name, date):
    kelvin = render(SEED, SCENE.coarser(3).window(0, 0, 146, 186), [MODALITIES["tir"]], JUNE)
    stored = np.round((kelvin["tir"].values - 149.0) / 0.00341802).astype("uint16")
    qa = np.full(stored.shape[1:], 1 << 6, "uint16")  # clear
    row, col = (round(v / 3) for v in SCENE.row_col(*PLACE.xy(0, 0)))
    qa[row : row + 4, col : col + 5] = 1 << 4  # cloud shadow
    grid = SCENE.coarser(3).window(0, 0, 146, 186)
    write_cog(folder / name / "st.tif", stored, grid, nodata=0)
    write_cog(folder / name / "qa.tif", qa, grid, nodata=1)
    files = {"lwir11": (f"{name}/st.tif", {}), "qa_pixel": (f"{name}/qa.tif", {})}
    return item("landsat-c2-l2", name, date, files, **{"eo:cloud_cover": 1.0})


def panchromatic(folder, name, date, reflectance, sun_elevation):
    """One reflectance everywhere, stored as if the sun stood overhead."""
    stored = (reflectance * np.sin(np.radians(sun_elevation)) + 0.1) / 2e-5
    numbers = np.full(SCENE.shape, np.round(stored), "uint16")
    write_cog(folder / name / "pan.tif", numbers, SCENE, nodata=0)
    qa = np.full(SCENE.coarser(2).shape, 1 << 6, "uint16")
    write_cog(folder / name / "qa.tif", qa, SCENE.coarser(2), nodata=1)
    files = {"pan": (f"{name}/pan.tif", {}), "qa_pixel": (f"{name}/qa.tif", {})}
    properties = {"view:sun_elevation": sun_elevation} if sun_elevation > 0 else {}
    return item("landsat-c2l1", name, date, files, **properties)


def naip(folder, name, date):
    """Four bands of one file, of eight bits."""
    stored = np.clip(np.round(np.concatenate([truth("rgb"), truth("nir")]) * 255), 0, 255)
    write_cog(folder / f"{name}.tif", stored.astype("uint8"), SCENE)
    return item("naip", name, date, {"image": (f"{name}.tif", {})})


def write_search(folder: Path, server: StacServer, profile="planetary-computer", **keys) -> Path:
    """search.yaml for a declared catalogue, with its addresses on loopback."""
    catalogue = declared_products().catalogues[profile].model_dump(mode="json")
    catalogue["url"] = server.base
    if server.token_s is None:
        catalogue["sign"] = None
    else:
        catalogue["sign"] = {"token_url": f"{server.base}/token/{{collection}}"}
    content = {
        "catalogue": "loopback",
        "products": {"rgb": "sentinel-2-l2a", "nir": "sentinel-2-l2a"},
        "places": {"here": list(lonlat_of_place())},
        "side_m": SIDE_M,
        "dates": ["2021-06-01", "2021-08-31"],
        "acquisitions": 1,
        "max_cloud": 40,
        "min_clear": 0.9,
        "tolerance_days": 6,
        "declare": {"catalogues": {"loopback": catalogue}},
        **keys,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SEARCH_FILE).write_text(yaml.safe_dump(content))
    return folder


def source(folder: Path, names=("rgb", "nir"), gsd_m=GSD_M, patch_px=PATCH_PX) -> StacSource:
    modalities = [MODALITIES[n] for n in names]
    return StacSource(folder, patch_px, gsd_m, modalities, patience=HASTE)


def mosaic(made: StacSource, unit_id: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of a place, put together from its patches."""
    unit = next(u for u in made.units() if u.unit_id == unit_id)
    rows: dict[str, list] = {}
    for patch in made.read(unit):
        rows.setdefault(patch.patch_id[-11:-6], []).append(patch.layers[name])
    values = [np.concatenate([x.values for x in row], axis=2) for _, row in sorted(rows.items())]
    valid = [np.concatenate([x.valid for x in row], axis=1) for _, row in sorted(rows.items())]
    return np.concatenate(values, axis=1), np.concatenate(valid)


def expected_reflectance(name):
    """What was rendered, as a product stores it: in steps of 0.0001."""
    return np.clip(np.round(window(truth(name)) / 1e-4), 1e-9, None) * 1e-4


def pins(folder):
    """What the lock says of the place."""
    return json.loads((folder / LOCK_FILE).read_text())["places"]["here"]


def assert_reflectance(made, unit_id=UNIT, known=None):
    for name in ("rgb", "nir"):
        values, valid = mosaic(made, unit_id, name)
        known = np.ones(PLACE.shape, bool) if known is None else known
        np.testing.assert_array_equal(valid, known)
        wanted = expected_reflectance(name)
        np.testing.assert_allclose(values[:, valid], wanted[:, valid], atol=1.1e-4)
