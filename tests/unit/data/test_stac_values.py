"""From a STAC API and COGs over HTTP to patches whose ground is known to the last number."""

import numpy as np
import pytest
from stac_fixtures import (
    PLACE,
    UNIT,
    assert_reflectance,
    cover,
    degrees,
    elevation,
    landsat,
    mosaic,
    naip,
    panchromatic,
    pins,
    plane,
    sentinel1,
    sentinel2,
    source,
    truth,
    window,
    write_search,
)

from mm_model.data.georeference import transform_xy
from mm_model.errors import DataError


@pytest.mark.parametrize(("baseline", "added"), [("05.09", 1000), ("04.00", 1000), ("03.01", 0)])
def test_reflectance_by_baseline(files, serve, tmp_path, baseline, added):
    made = sentinel2(files, f"S2_{added}_{baseline}", "2021-06-21", added=added, baseline=baseline)
    folder = write_search(tmp_path, serve([made]))
    assert_reflectance(source(folder))
    (chosen,) = pins(folder)["acquisitions"][0]["images"]["sentinel-2-l2a"]
    assert (chosen["baseline"], chosen["offset"]) == (baseline, -0.1 if added else 0.0)


def test_patches_know_place_date_and_grid(clear, serve, tmp_path):
    made = source(write_search(tmp_path, serve([clear])))
    (unit,) = made.units()
    patches = list(made.read(unit))
    assert unit.unit_id == UNIT
    assert [p.patch_id for p in patches] == [
        f"loopback/{UNIT}/{r:05d}-{c:05d}" for r in (0, 32, 64) for c in (0, 32, 64)
    ]
    assert {p.place_id for p in patches} == {"loopback/here"}
    assert patches[0].grid.transform == PLACE.transform
    assert all(x.acquired_at == "2021-06-21" for p in patches for x in p.layers.values())
    assert {x.native_gsd_m for p in patches for x in p.layers.values()} == {10.0}


def test_layers_know_at_which_distance_they_were_measured(files, clear, serve, tmp_path):
    items = [clear, landsat(files, "LC08_gsd", "2021-06-18")]
    products = {"nir": "sentinel-2-l2a", "ms": "sentinel-2-l2a", "tir": "landsat-c2-l2"}
    made = source(
        write_search(tmp_path, serve(items), products=products), ("nir", "ms", "tir"), 20.0, 16
    )
    patch = next(iter(made.read(made.units()[0])))
    assert {n: x.native_gsd_m for n, x in patch.layers.items()} == {"nir": 10, "ms": 20, "tir": 100}


def test_radar_becomes_decibels_and_its_own_nodata_a_mask(files, clear, serve, tmp_path):
    items = [clear, sentinel1(files, "S1_0619", "2021-06-19")]
    items.append(sentinel1(files, "S1_EW", "2021-06-21", mode="EW"))
    products = {"nir": "sentinel-2-l2a", "sar": "sentinel-1-rtc"}
    folder = write_search(tmp_path, serve(items), products=products)
    values, valid = mosaic(source(folder, ("nir", "sar")), UNIT, "sar")
    assert not valid[:8].any()
    assert valid[8:].all()
    np.testing.assert_allclose(values[:, valid], window(truth("sar"))[:, valid], atol=1e-3)
    images = pins(folder)["acquisitions"][0]["images"]
    assert [i["id"] for i in images["sentinel-1-rtc"]] == ["S1_0619"]  # EW is another mode


def test_elevation_and_cover_in_degrees_lie_where_they_should(files, clear, serve, tmp_path):
    # The place lies on the seam of two elevation tiles.
    west = degrees(1 / 3600)
    lon = west.transform[2] + 180 / 3600 * 1.0
    left = west.window(0, 0, west.height, 180)
    right = west.window(0, 180, west.height, west.width - 180)
    assert left.bounds[2] == pytest.approx(lon)
    grid = degrees(1 / 12000)
    land, codes = cover(files, "WC_v200", grid)
    old, _ = cover(files, "WC_v100", grid, version="1.0.0")
    items = [clear, elevation(files, "W", left), elevation(files, "E", right), old, land]
    products = {"nir": "sentinel-2-l2a", "dem": "cop-dem-glo-30", "map": "esa-worldcover"}
    folder = write_search(tmp_path, serve(items), products=products)
    made = source(folder, ("nir", "dem", "map"))
    assert {i["id"] for i in pins_after(made, folder)["timeless"]["cop-dem-glo-30"]} == {"W", "E"}

    rows, cols = np.mgrid[:96, :96] + 0.5
    xs, ys = PLACE.xy(rows.ravel(), cols.ravel())
    lons, lats = transform_xy(PLACE.crs, "EPSG:4326", xs.tolist(), ys.tolist())
    values, valid = mosaic(made, UNIT, "dem")
    assert valid.all()
    seam = np.abs(np.array(lons) - lon).reshape(96, 96) < 1.1 / 3600
    error = np.abs(values[0] - plane(lons, lats).reshape(96, 96))
    assert error[~seam].max() < 0.02  # metres, on a slope of 2 to 3 m a kilometre and more
    assert error.max() < 2

    values, valid = mosaic(made, UNIT, "map")
    assert valid.all()
    at = np.array([grid.row_col(x, y) for x, y in zip(lons, lats, strict=True)])
    # A pixel spans 1.6 of the map's along a parallel and gets their majority: compared where all
    # within reach are of one class.
    row, col = np.floor(at).astype(int).T
    reach = [codes[row + r, col + c] for r in (-2, 0, 2) for c in (-2, 0, 2)]
    inner = (np.array(reach) == codes[row, col]).all(axis=0)
    assert inner.mean() > 0.1
    assert len(np.unique(codes[row, col][inner])) > 5
    np.testing.assert_array_equal(values[0].ravel()[inner], codes[row, col][inner])


def pins_after(made, folder):
    made.units()
    return pins(folder)


def test_surface_temperature_in_kelvin_without_shadow(files, clear, serve, tmp_path):
    items = [clear, landsat(files, "LC08", "2021-06-18")]
    products = {"nir": "sentinel-2-l2a", "tir": "landsat-c2-l2"}
    folder = write_search(tmp_path, serve(items), products=products)
    made = source(folder, ("nir", "tir"), gsd_m=30.0, patch_px=16)
    values, valid = mosaic(made, UNIT, "tir")
    assert valid.shape == (32, 32)
    assert not valid[:4, :5].any()
    assert valid.sum() == 32 * 32 - 20
    assert values[0, valid].min() > 230
    assert values[0, valid].max() < 340


def test_a_sun_that_is_low_makes_the_ground_no_darker(files, serve, tmp_path):
    for sun in (25.0, 62.0):
        made = panchromatic(files, f"L1_{sun}", "2021-06-18", 0.23, sun)
        folder = tmp_path / str(sun)
        write_search(folder, serve([made]), "usgs", products={"pan": "landsat-c2-l1"})
        values, valid = mosaic(source(folder, ("pan",)), "here/2021-06-18", "pan")
        assert valid.all()
        np.testing.assert_allclose(values, 0.23, atol=5e-5)
    unknown = panchromatic(files, "L1_night", "2021-06-18", 0.23, 0.0)
    folder = write_search(
        tmp_path / "none", serve([unknown]), "usgs", products={"pan": "landsat-c2-l1"}
    )
    with pytest.raises(DataError, match="L1_night: its view:sun_elevation is None"):
        source(folder, ("pan",)).units()


def test_bands_of_one_file_are_read_together(files, serve, tmp_path):
    server = serve([naip(files, "NAIP", "2021-07-02")])
    folder = write_search(tmp_path, server, products={"rgb": "naip", "nir": "naip"})
    made = source(folder)
    for name in ("rgb", "nir"):
        values, valid = mosaic(made, "here/2021-07-02", name)
        assert valid.all()
        expected = np.clip(window(truth(name)), 0, 1)
        np.testing.assert_allclose(values, expected, atol=0.5 / 255 + 1e-6)
    (unit,) = made.units()
    server.asked.clear()
    list(made.read(unit))
    assert len(server.asked) <= 4


def test_bands_of_20_m_beside_those_of_10_m(clear, serve, tmp_path):
    folder = write_search(
        tmp_path, serve([clear]), products={"nir": "sentinel-2-l2a", "ms": "sentinel-2-l2a"}
    )
    values, valid = mosaic(source(folder, ("nir", "ms")), UNIT, "ms")
    assert valid.all()
    expected = np.arange(6)[:, None, None] * 0.1 + 0.05  # B05, B06, B07, B8A, B11, B12
    np.testing.assert_allclose(values, np.broadcast_to(expected, values.shape), atol=1e-6)


def test_clouds_and_shadows_are_in_the_mask(files, serve, tmp_path):
    made = [
        sentinel2(files, f"S2_C{code}", "2021-06-21", covered=(slice(0, 6), slice(4, 11), code))
        for code in (3, 8)
    ]
    hidden = np.zeros(PLACE.shape, bool)
    hidden[:12, 8:22] = True  # of 20 m, in pixels of 10 m
    for number, one in enumerate(made):
        folder = write_search(tmp_path / str(number), serve([one]))
        assert_reflectance(source(folder), known=~hidden)
