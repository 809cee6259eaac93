"""From an area and a time span to patches, as DVC runs it, and real rasters read both ways."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/unit/data"))
import stac_fixtures as made  # noqa: E402
from stac_server import StacServer  # noqa: E402
from test_dvc_pipeline import dvc  # noqa: E402

from mm_model.config import load_params  # noqa: E402
from mm_model.data.georeference import transform_xy  # noqa: E402
from mm_model.data.prepare import open_source, prepare  # noqa: E402
from mm_model.data.raster import read_raster  # noqa: E402
from mm_model.data.sources.geotiff import GeotiffSource  # noqa: E402
from mm_model.data.store import PatchStore  # noqa: E402
from mm_model.geo.grid import Grid  # noqa: E402
from mm_model.modalities import MODALITIES, select  # noqa: E402

DATA = Path(os.environ.get("MM_REAL_DATA", ROOT.parent / "shared" / "data"))
FIVE = ("rgb", "nir", "sar", "dem", "map")
PRODUCTS = {
    "rgb": "sentinel-2-l2a",
    "nir": "sentinel-2-l2a",
    "sar": "sentinel-1-rtc",
    "dem": "cop-dem-glo-30",
    "map": "esa-worldcover",
}

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def write_area(folder: Path) -> str:
    """A triangle in the scene, none of whose sides is a meridian."""
    lon, lat = made.lonlat_of_place()
    corners = [(lon - 0.012, lat - 0.006), (lon + 0.012, lat - 0.004), (lon, lat + 0.009)]
    ring = [*corners, corners[0]]
    area = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon"}}
    area["geometry"]["coordinates"] = [[list(point) for point in ring]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "area.geojson").write_text(json.dumps(area))
    return "area.geojson"


def write_pipeline(folder: Path, server: StacServer, **keys: object) -> None:
    search = folder / "search"
    area = write_area(search)
    made.write_search(search, server, products=PRODUCTS, area=area, places={}, **keys)
    params = yaml.safe_load((ROOT / "examples/stac/params.yaml").read_text())
    params |= {"project": str(ROOT), "modalities": list(FIVE)}
    params["prepare"] |= {"patch_px": made.PATCH_PX}
    params["prepare"]["alignment"]["action"] = "keep"  # what is read is compared, not moved
    params["prepare"]["geotiff"] = {"manifest": "params.yaml"}  # not read
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())


def assert_physical(store: PatchStore, codes: np.ndarray, cover: Grid) -> set[str]:
    """Every known pixel shows the ground that is there, in its unit; the layers that were seen."""
    seen: set[str] = set()
    for position in range(len(store)):
        patch = store.read(position)
        row, col = (round(v) for v in made.SCENE.row_col(*patch.grid.xy(0, 0)))
        side = patch.grid.height
        here = slice(row, row + side), slice(col, col + side)
        rows, cols = np.mgrid[:side, :side] + 0.5
        xs, ys = patch.grid.xy(rows.ravel(), cols.ravel())
        lons, lats = transform_xy(patch.grid.crs, "EPSG:4326", xs.tolist(), ys.tolist())
        expected = {name: made.truth(name)[:, *here] for name in ("rgb", "nir", "sar")}
        expected["dem"] = made.plane(lons, lats).reshape(1, side, side)
        for name, atol in (("rgb", 1.1e-4), ("nir", 1.1e-4), ("sar", 1e-3), ("dem", 0.02)):
            if name in patch.layers:
                layer = patch.layers[name]
                wanted = np.clip(expected[name], *MODALITIES[name].valid_range)
                found = layer.values[:, layer.valid]
                np.testing.assert_allclose(found, wanted[:, layer.valid], atol=atol)
        if "map" in patch.layers:
            at = np.floor([cover.row_col(x, y) for x, y in zip(lons, lats, strict=True)])
            r, c = at.astype(int).T
            near = [codes[r + i, c + j] for i in (-2, 0, 2) for j in (-2, 0, 2)]
            inner = (np.array(near) == codes[r, c]).all(axis=0)
            assert inner.any()
            found = patch.layers["map"].values[0].ravel()[inner]
            np.testing.assert_array_equal(found, codes[r, c][inner])
        seen |= set(patch.layers)
    return seen


def test_an_area_and_a_time_span_become_patches_and_stay_them(files, tmp_path):
    grid = made.degrees(1 / 12000)
    land, codes = made.cover(files, "WC_v200", grid)
    covered = (slice(0, 10), slice(0, 20), 9)
    items = [
        made.sentinel2(files, "S2_old", "2021-06-10", added=0, baseline="03.01", cloud=70.0),
        made.sentinel2(files, "S2_new", "2021-06-21", covered=covered),
        made.sentinel1(files, "S1_0619", "2021-06-19"),
        made.elevation(files, "DEM", made.degrees(1 / 3600)),
        land,
    ]
    with StacServer(files, items, token_s=3600) as server:
        write_pipeline(tmp_path, server)
        dvc(tmp_path, "init", "--no-scm", "-q")
        first = dvc(tmp_path, "repro", "prepare")
        assert first.returncode == 0, first.stdout + first.stderr
        store = PatchStore(tmp_path / "data/patches")
        assert assert_physical(store, codes, grid) == set(FIVE)
        places = set(store.index["place_id"])
        assert len(places) > 3
        assert len(store) == 9 * len(places)
        lock = json.loads((tmp_path / "search/items.lock.json").read_text())
        assert len(lock["places"]) == len(places)
        # Where clouds were is unknown, and only there.
        optical = store.index[store.index["modality"] == "rgb"]
        unknown = (1 - optical["valid_fraction"]).sum() * made.PATCH_PX**2
        assert unknown == 4 * 10 * 20

        server.asked.clear()
        again = dvc(tmp_path, "repro", "prepare")
        assert "up to date" in again.stdout
        assert not server.asked
    # The catalogue is down: nothing of it is needed any more, and what is new ends in one line.
    again = dvc(tmp_path, "repro", "prepare")
    assert "up to date" in again.stdout
    before = (tmp_path / "search/items.lock.json").read_bytes()
    write_pipeline(tmp_path, server, max_cloud=80)
    failed = dvc(tmp_path, "repro", "prepare")
    assert failed.returncode != 0
    (line,) = [x for x in (failed.stdout + failed.stderr).splitlines() if "error: " in x]
    assert "catalogue loopback (http://127.0.0.1" in line
    assert "run it again later" in line
    assert (tmp_path / "search/items.lock.json").read_bytes() == before
    assert len(PatchStore(tmp_path / "data/patches")) == 9 * len(places)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real rasters: set MM_REAL_DATA")
def test_real_images_are_the_same_by_catalogue_and_by_manifest(files, tmp_path, monkeypatch):
    monkeypatch.setenv("MM_REAL_DATA", str(DATA))
    modalities = select(("rgb", "nir", "sar", "dem"))
    manifest = ROOT / "examples/real/manifest.yaml"
    whole = GeotiffSource(manifest, 100, 10.0, modalities)
    (unit,) = [u for u in whole.units() if u.unit_id == "worldcereal_belgium_monthly/2021-06"]
    (scene,) = whole.read(unit)
    items = belgium(files)
    lon, lat = transform_xy(scene.grid.crs, "EPSG:4326", *([v] for v in scene.grid.xy(49, 52)))
    for number, name in enumerate(("S2_offset", "S2_plain")):
        with StacServer(files, [items[name], items["S1"], items["DEM"]]) as server:
            folder = tmp_path / str(number)
            made.write_search(
                folder / "search",
                server,
                products={name: PRODUCTS[name] for name in ("rgb", "nir", "sar", "dem")},
                places={"belgium": [lon[0], lat[0]]},
                side_m=640.0,
                min_clear=0.5,
            )
            found = made.source(folder / "search", ("rgb", "nir", "sar", "dem"), patch_px=32)
            assert (
                prepare(
                    found, folder / "patches", modalities, shard_patches=9, min_valid_fraction=0.1
                )
                == 4
            )
        store = PatchStore(folder / "patches")
        for position in range(len(store)):
            patch = store.read(position)
            row, col = (round(v) for v in scene.grid.row_col(*patch.grid.xy(0, 0)))
            here = slice(row, row + 32), slice(col, col + 32)
            assert set(patch.layers) == set(scene.layers)
            for name, layer in patch.layers.items():
                wanted = scene.layers[name]
                np.testing.assert_array_equal(layer.valid, wanted.valid[here])
                np.testing.assert_allclose(
                    layer.values[:, layer.valid],
                    wanted.values[:, *here][:, layer.valid],
                    atol=1e-4 if name in ("sar", "dem") else 1e-6,
                )


def belgium(files: Path) -> dict[str, dict]:
    """June 2021 near Brussels as catalogues serve it, the optical image with and without offset."""
    folder = DATA / "worldcereal_belgium_monthly/2021-06"
    stack = read_raster(folder / "s2_l2a.tif", bands=["B04", "B03", "B02", "B08"])
    radar, height = read_raster(folder / "s1.tif"), read_raster(folder / "dem.tif")
    grid, found = stack.grid, {}
    for name, added, baseline in (("S2_offset", 1000, "05.00"), ("S2_plain", 0, "02.14")):
        for values, band in zip(stack.values, ("B04", "B03", "B02", "B08"), strict=True):
            numbers = np.where(stack.valid, values + added, 0).astype("uint16")
            made.write_cog(files / name / f"{band}.tif", numbers, grid, nodata=0)
        clear = np.full((grid.height // 2, grid.width // 2), 4, "uint8")
        made.write_cog(files / name / "SCL.tif", clear, grid.coarser(2), nodata=0)
        bands = ("B04", "B03", "B02", "B08", "SCL")
        found[name] = made.item(
            "sentinel-2-l2a", name, "2021-06-15", {b: (f"{name}/{b}.tif", {}) for b in bands}, grid,
            **{"eo:cloud_cover": 1.0, "s2:processing_baseline": baseline},
        )  # fmt: skip
    power = np.power(10.0, radar.values.astype("float64") / 10).astype("float32")
    for values, band in zip(power, ("vv", "vh"), strict=True):
        made.write_cog(files / f"S1/{band}.tif", values, grid, nodata=-32768.0)
    found["S1"] = made.item(
        "sentinel-1-rtc", "S1", "2021-06-14", {b: (f"S1/{b}.tif", {}) for b in ("vv", "vh")}, grid,
        **{"sar:instrument_mode": "IW"},
    )  # fmt: skip
    made.write_cog(files / "height.tif", height.values[0].astype("float32"), height.grid)
    found["DEM"] = made.item(
        "cop-dem-glo-30", "DEM", "2021-04-22", {"data": ("height.tif", {})}, height.grid
    )
    return found


@pytest.mark.network
@pytest.mark.parametrize("catalogue", ["planetary-computer", "earth-search"])
def test_the_live_catalogues_still_have_what_is_declared(tmp_path, catalogue):
    """One place of the example, each product that the catalogue has."""
    params = load_params(ROOT / "examples/stac/params.yaml")
    search = yaml.safe_load((ROOT / "examples/stac/search/search.yaml").read_text())
    has = params.prepare.model_copy()
    names = FIVE if catalogue == "planetary-computer" else ("rgb", "nir", "dem")
    del search["area"]
    search |= {
        "catalogue": catalogue,
        "products": {name: PRODUCTS[name] for name in names},
        "places": {"constance": [9.03, 47.72]},
        "side_m": 640.0,
        "acquisitions": 1,
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    assert has.stac is not None
    config = has.model_copy(update={"stac": has.stac.model_copy(update={"search": tmp_path})})
    modalities = select(names)
    source = open_source(config, modalities)
    assert (
        prepare(source, tmp_path / "patches", modalities, shard_patches=9, min_valid_fraction=0.1)
        == 1
    )
    patch = PatchStore(tmp_path / "patches").read(0)
    assert set(patch.layers) == set(names)
    medians = {n: float(np.median(x.values[:, x.valid])) for n, x in patch.layers.items()}
    assert 0.005 < medians["rgb"] < 0.4
    assert 390 < medians["dem"] < 700  # the lake lies at 395 m
    if "sar" in medians:
        assert -30 < medians["sar"] < 0
