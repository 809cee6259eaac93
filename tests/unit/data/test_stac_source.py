"""From a STAC API and COGs over HTTP to patches whose ground is known to the last number."""

import json

import numpy as np
import pytest
from stac_fixtures import (
    PLACE,
    SCENE,
    cover,
    degrees,
    elevation,
    landsat,
    lonlat_of_place,
    mosaic,
    plane,
    sentinel1,
    sentinel2,
    source,
    truth,
    window,
    write_search,
)
from stac_server import StacServer

from mm_model.data.prepare import prepare
from mm_model.data.raster import transform_xy
from mm_model.data.sources.stac.request import LOCK_FILE
from mm_model.errors import ConfigError, DataError, RasterError, ServiceError
from mm_model.modalities import MODALITIES

UNIT = "here/2021-06-21"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def clear(files):
    return sentinel2(files, "S2_0621", "2021-06-21")


@pytest.fixture
def serve(files):
    running = []

    def start(items, **options):
        server = StacServer(files, items, **options)
        running.append(server)
        return server.__enter__()

    yield start
    for server in running:
        server.__exit__()


def expected_reflectance(name):
    """What was rendered, as a product stores it: in steps of 0.0001."""
    return np.clip(np.round(window(truth(name)) / 1e-4), 1e-9, None) * 1e-4


def pins(folder):
    return json.loads((folder / LOCK_FILE).read_text())["places"]["here"]


def assert_reflectance(made, unit_id=UNIT, known=None):
    for name in ("rgb", "nir"):
        values, valid = mosaic(made, unit_id, name)
        known = np.ones(PLACE.shape, bool) if known is None else known
        np.testing.assert_array_equal(valid, known)
        wanted = expected_reflectance(name)
        np.testing.assert_allclose(values[:, valid], wanted[:, valid], atol=1.1e-4)


# --- values, the whole way through ------------------------------------------------------------


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


# --- which items ------------------------------------------------------------------------------


def test_the_clearest_over_the_place_is_chosen_for_each_part_of_the_time(files, serve, tmp_path):
    half = (slice(0, 24), slice(0, 48), 9)
    items = [
        sentinel2(files, "A_scene_cloudy", "2021-06-05", cloud=70.0),
        sentinel2(files, "B_place_cloudy", "2021-06-11", cloud=2.0, covered=half),
        sentinel2(files, "C_clear", "2021-06-21", cloud=20.0),
        sentinel2(files, "D_august", "2021-08-20", cloud=3.0),
        sentinel1(files, "R_near", "2021-06-25"),
        sentinel1(files, "R_far", "2021-06-16"),
        sentinel1(files, "R_too_far", "2021-08-30"),
    ]
    server = serve(items)
    products = {"rgb": "sentinel-2-l2a", "sar": "sentinel-1-rtc"}
    folder = write_search(tmp_path, server, acquisitions=2, products=products)
    made = source(folder, ("rgb", "sar"))
    assert [u.unit_id for u in made.units()] == [UNIT, "here/2021-08-20"]
    june, august = pins(folder)["acquisitions"]
    assert [i["id"] for i in june["images"]["sentinel-2-l2a"]] == ["C_clear"]
    assert [i["id"] for i in june["images"]["sentinel-1-rtc"]] == ["R_near"]
    assert "sentinel-1-rtc" not in august["images"]
    assert pins(folder)["passed_over"] == {"B_place_cloudy": "50% of here clear"}
    assert server.count("A_scene_cloudy") == 0
    layers = [set(p.layers) for u in made.units() for p in made.read(u)]
    assert layers == [{"rgb", "sar"}] * 9 + [{"rgb"}] * 9


def test_the_lock_pins_what_is_read(files, clear, serve, tmp_path):
    server = serve([clear])
    folder = write_search(tmp_path, server)
    before = source(folder).units()
    content = (folder / LOCK_FILE).read_bytes()
    assert b"sig=" not in content
    server.items.insert(0, sentinel2(files, "S2_better", "2021-06-22", cloud=0.0))
    searches = server.count("/search")
    again = source(folder)
    assert again.units() == before
    assert server.count("/search") == searches
    assert (folder / LOCK_FILE).read_bytes() == content
    assert_reflectance(again)
    # Another question is another search; without the lock it is a new one.
    write_search(folder, server, max_cloud=39)
    assert [u.unit_id for u in source(folder).units()] == ["here/2021-06-22"]


def test_one_more_place_leaves_the_others_pinned(files, clear, serve, tmp_path):
    server = serve([clear])
    folder = write_search(tmp_path, server)
    before = source(folder).units()
    lon, lat = lonlat_of_place()
    server.items.append(sentinel2(files, "S2_better", "2021-06-22", cloud=0.0))
    write_search(folder, server, places={"here": [lon, lat], "there": [lon + 0.01, lat]})
    ids = {u.unit_id: u.fingerprint for u in source(folder).units()}
    assert set(ids) == {UNIT, "there/2021-06-22"}
    assert ids[UNIT] == before[0].fingerprint


def test_a_search_reads_all_pages(files, serve, tmp_path):
    cloudy = (slice(0, 48), slice(0, 48), 9)
    first = sentinel2(files, "P0", "2021-06-02", covered=cloudy)
    items = [{**first, "id": f"P{k}"} for k in range(4)]
    items.append(sentinel2(files, "P_clear", "2021-06-21", cloud=6.0))
    for k, one in enumerate(items[:4]):
        one["properties"] = {**first["properties"], "datetime": f"2021-06-0{k + 2}T10:30:00+00:00"}
    server = serve(items)
    assert [u.unit_id for u in source(write_search(tmp_path, server)).units()] == [UNIT]
    assert server.count("/search", "POST") == 3


# --- offsets that catalogues are wrong about --------------------------------------------------

FLAG = "earthsearch:boa_offset_applied"


@pytest.mark.parametrize(
    ("added", "flag", "told"),
    [
        (0, True, FLAG),
        (0, False, "darkest pixels"),  # issues 66 and 71: taken off, and the flag denies it
        (1000, False, "darkest pixels"),
    ],
)
def test_wrong_flags_of_earth_search(files, serve, tmp_path, added, flag, told):
    made = sentinel2(files, f"E_{added}_{flag}", "2021-06-21", added=added, **{FLAG: flag})
    for asset in made["assets"].values():
        asset["raster:bands"] = [{"scale": 1e-4, "offset": -0.1}]
    folder = write_search(tmp_path, serve([made]), profile="earth-search")
    assert_reflectance(source(folder))
    (chosen,) = pins(folder)["acquisitions"][0]["images"]["sentinel-2-l2a"]
    assert chosen["offset"] == (-0.1 if added else 0.0)
    assert told in chosen["offset_from"]


def test_an_offset_that_nothing_tells_passes_the_item_over(files, serve, tmp_path):
    made = sentinel2(files, "E_unsure", "2021-06-21", added=3000, **{FLAG: False})
    server = serve([made])
    folder = write_search(tmp_path, server, profile="earth-search")
    with pytest.raises(DataError, match=r"E_unsure: nothing tells the offset"):
        source(folder).units()
    write_search(folder, server, profile="earth-search", offsets={"E_unsure": -0.3})
    assert_reflectance(source(folder))


def test_the_products_own_metadata_tell_where_the_baseline_is_missing(files, serve, tmp_path):
    made = sentinel2(files, "S2_xml", "2021-06-21", baseline=None)
    (files / "S2_xml/mtd.xml").write_text(
        "<a><PROCESSING_BASELINE>04.00</PROCESSING_BASELINE>"
        '<BOA_ADD_OFFSET band_id="0">-1000</BOA_ADD_OFFSET></a>'
    )
    made["assets"]["product-metadata"] = {"href": "{base}/files/S2_xml/mtd.xml"}
    assert_reflectance(source(write_search(tmp_path, serve([made]))))


# --- what goes over the line, and what goes wrong there ---------------------------------------


def test_only_windows_are_fetched_and_each_header_once(files, clear, serve, tmp_path):
    server = serve([clear])
    made = source(write_search(tmp_path, server))
    (unit,) = made.units()
    server.asked.clear()
    list(made.read(unit))
    for band in ("red", "green", "blue", "nir"):
        mine = [a for a in server.asked if a.path.endswith(f"/{band}.tif")]
        size = (files / "S2_0621" / f"{band}.tif").stat().st_size
        assert {a.status for a in mine if a.method == "GET"} == {206}
        assert sum(a.method == "HEAD" for a in mine) == 1
        assert sum(a.sent for a in mine) < size / 2
    assert SCENE.height * SCENE.width > 25 * PLACE.height * PLACE.width


@pytest.mark.parametrize("what", [429, 500, 503, "truncate", "drop"])
@pytest.mark.parametrize("path", [r"^/$", "^/search$", r"red\.tif$", r"scl\.tif$", "^/token/"])
def test_what_fails_for_a_while_costs_nothing(clear, serve, tmp_path, path, what):
    server = serve([clear], token_s=3600)
    server.fail(path, what, times=2)
    assert_reflectance(source(write_search(tmp_path, server)))
    assert server.faults[0].times == 0


def test_failure_in_the_middle_of_a_file_is_made_good(clear, serve, tmp_path):
    for number, what in enumerate((503, "truncate")):
        server = serve([clear])
        server.fail(r"nir\.tif$", what, times=2, skip=1)  # behind the header
        assert_reflectance(source(write_search(tmp_path / str(number), server)))
        assert server.faults[0].times == 0


def test_a_token_is_kept_until_shortly_before_it_expires(clear, serve, tmp_path):
    server = serve([clear], token_s=3600)
    assert_reflectance(source(write_search(tmp_path / "long", server)))
    assert len(server.tokens) == 2  # one for the search, one for each catalogue object
    short = serve([clear], token_s=30)  # under the minute that is kept in reserve
    assert_reflectance(source(write_search(tmp_path / "short", short)))
    assert len(short.tokens) > 4


def test_an_expired_signature_is_renewed(clear, serve, tmp_path, monkeypatch):
    server = serve([clear], token_s=3600)
    made = source(write_search(tmp_path, server))
    (unit,) = made.units()
    list(made.read(unit))
    server.revoked.update(server.tokens)
    monkeypatch.setattr("mm_model.data.sources.stac.signing._JUST_NOW_S", 0.0)
    assert_reflectance(made)
    assert any(a.status == 403 for a in server.asked)


def test_a_catalogue_that_is_down_ends_in_a_clear_error_and_keeps_what_was_found(
    files, clear, serve, tmp_path
):
    server = serve([clear])
    lon, lat = lonlat_of_place()
    places = {"a": [lon, lat], "b": [lon + 0.004, lat], "c": [lon + 0.008, lat]}
    folder = write_search(tmp_path, server, places=places)
    server.fail("^/search$", 503, times=10_000, skip=2)
    with pytest.raises(ServiceError, match=r"catalogue loopback \(http.*again later"):
        source(folder).units()
    assert list(json.loads((folder / LOCK_FILE).read_text())["places"]) == ["a", "b"]
    server.faults.clear()
    server.asked.clear()
    assert len(source(folder).units()) == 3
    assert server.count("^/search$", "POST") == 1


def test_preparing_goes_on_where_a_server_gave_up(clear, serve, tmp_path):
    server = serve([clear])
    lon, lat = lonlat_of_place()
    places = {"a": [lon, lat], "b": [lon + 0.008, lat]}
    folder = write_search(tmp_path / "search", server, places=places)
    modalities = [MODALITIES["rgb"], MODALITIES["nir"]]
    options = {"shard_patches": 100, "min_valid_fraction": 0.5}
    source(folder).units()

    class Slow(type(source(folder))):
        def read(self, unit):
            if unit.unit_id.startswith("b/"):
                server.fail(r"nir\.tif$", 503, times=10_000)
            return super().read(unit)

    broken = source(folder)
    broken.__class__ = Slow
    with pytest.raises(ServiceError, match=r"nir\.tif cannot be read.*503.*again later"):
        prepare(broken, tmp_path / "patches", modalities, **options)
    assert not (tmp_path / "patches").exists()
    server.faults.clear()
    server.asked.clear()
    read = []

    class Counting(type(source(folder))):
        def read(self, unit):
            read.append(unit.unit_id)
            return super().read(unit)

    whole = source(folder)
    whole.__class__ = Counting
    assert prepare(whole, tmp_path / "patches", modalities, **options) == 18
    assert read == ["b/2021-06-21"]


def test_what_is_not_there_or_no_geotiff_is_named(files, clear, serve, tmp_path):
    server = serve([clear])
    folder = write_search(tmp_path, server)
    made = source(folder)
    (unit,) = made.units()
    server.fail(r"green\.tif$", 404, times=10_000)
    with pytest.raises(RasterError, match=r"green\.tif does not exist"):
        list(made.read(unit))
    server.faults.clear()
    (files / "S2_text").mkdir(exist_ok=True)
    vrt = f"<VRTDataset rasterXSize='1' rasterYSize='1'>{'x' * 400}</VRTDataset>"
    for name in ("red", "green", "blue", "nir", "scl"):
        (files / f"S2_text/{name}.tif").write_text(vrt)
    text = json.loads(json.dumps(clear).replace("S2_0621", "S2_text"))
    with pytest.raises(RasterError, match=r"scl\.tif is no GeoTIFF"):
        source(write_search(tmp_path / "text", serve([text]))).units()


def test_an_address_that_is_no_http_is_refused(clear, serve, tmp_path):
    text = json.dumps(clear).replace("{base}/files/S2_0621/scl.tif", "/etc/passwd")
    with pytest.raises(RasterError, match="http or https"):
        source(
            write_search(tmp_path, serve([json.loads(text.replace("/etc", "file:///etc"))]))
        ).units()


# --- what is asked ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"catalogue": "nowhere"}, "catalogue; got nowhere"),
        ({"products": {"rgb": "sentinel-1-rtc"}}, "products.rgb"),
        ({"products": {"colour": "sentinel-2-l2a"}}, "colour"),
        ({"side_m": 1000.0}, "side_m"),
        ({"dates": ["2021-07-01", "2021-06-01"]}, "first day"),
        ({"places": {"x": [10.0, 95.0]}}, "x: position"),
        ({"places": {}}, "either area"),
        ({"cloudiness": 3}, "cloudiness"),
    ],
)
def test_a_wrong_search_is_named(clear, serve, tmp_path, keys, message):
    folder = write_search(tmp_path, serve([clear]), **keys)
    with pytest.raises(ConfigError, match=message):
        source(folder)


def test_an_area_is_covered_by_squares_of_one_lattice(clear, serve, tmp_path):
    server = serve([clear])
    lon, lat = lonlat_of_place()
    ring = [[lon + x, lat + y] for x, y in ((-0.02, -0.01), (0.02, -0.01), (0.0, 0.012))]
    area = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    (tmp_path / "area.geojson").write_text(json.dumps(area))
    made = source(write_search(tmp_path, server, area="area.geojson", places={}))
    corners = {
        p.grid.xy(0, 0)
        for u in made.units()
        for p in made.read(u)
        if p.patch_id[-11:] == "00000-00000"
    }
    assert len(corners) == len(made.units()) > 4
    assert all(x % 960 == 0 and y % 960 == 0 for x, y in corners)
