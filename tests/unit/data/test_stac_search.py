"""Which items a search chooses, what it believes of them, and what it may ask."""

import json
from pathlib import Path

import pytest
import yaml
from stac_fixtures import (
    PLACE,
    UNIT,
    assert_reflectance,
    footprint,
    lonlat_of_place,
    pins,
    sentinel1,
    sentinel2,
    source,
    write_search,
)

from mm_model.config import load_params
from mm_model.data.sources.stac.places import places_of
from mm_model.data.sources.stac.request import (
    LOCK_FILE,
    SEARCH_FILE,
    declared_products,
    licences,
    load_request,
)
from mm_model.data.sources.stac.source import StacSource
from mm_model.errors import ConfigError, DataError
from mm_model.modalities import MODALITIES

ROOT = Path(__file__).parents[3]


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


def test_of_equally_clear_images_the_one_looked_at_first_is_taken(files, serve, tmp_path):
    corner = (slice(0, 33), slice(0, 33), 9)  # 135 / 256 is clear: rounded, it would be less
    items = [
        sentinel2(files, "E_cloudier", "2021-06-05", cloud=30.0, covered=corner),
        sentinel2(files, "F_fewer_clouds", "2021-06-21", cloud=2.0, covered=corner),
    ]
    folder = write_search(tmp_path, serve(items))
    assert [u.unit_id for u in source(folder).units()] == [UNIT]
    (june,) = pins(folder)["acquisitions"]
    assert (june["date"], june["clear"]) == ("2021-06-21", 0.5273)
    assert pins(folder)["passed_over"] == {"E_cloudier": "53% of here clear"}


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


def test_of_images_of_one_ground_only_those_that_add_some_are_read(files, serve, tmp_path):
    older = sentinel2(files, "A_older", "2021-06-21", added=0, baseline="03.01")
    newer = sentinel2(files, "B_newer", "2021-06-21", baseline="05.00")
    beside = sentinel2(files, "C_beside", "2021-06-21", baseline="05.00")
    beside["geometry"] = footprint(PLACE.window(0, 90, 96, 6))
    server = serve([older, beside, newer])
    folder = write_search(tmp_path, server)
    assert_reflectance(source(folder))
    (chosen,) = pins(folder)["acquisitions"][0]["images"]["sentinel-2-l2a"]
    assert chosen["id"] == "B_newer"
    assert server.count("A_older") == server.count("C_beside") == 0


def test_an_item_that_is_excluded_is_searched_again_and_no_other(files, clear, serve, tmp_path):
    server = serve([clear, sentinel2(files, "S2_0725", "2021-07-25", cloud=9.0)])
    folder = write_search(tmp_path, server)
    assert [u.unit_id for u in source(folder).units()] == [UNIT]
    server.asked.clear()
    write_search(folder, server, exclude=["S2_elsewhere"])
    assert [u.unit_id for u in source(folder).units()] == [UNIT]
    assert not server.asked
    write_search(folder, server, exclude=["S2_0621"])
    assert [u.unit_id for u in source(folder).units()] == ["here/2021-07-25"]


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


def test_the_example_asks_for_every_modality_of_its_parameters():
    params = load_params(ROOT / "examples/stac/params.yaml")
    assert params.prepare.source == "stac"
    folder = ROOT / "examples/stac" / params.prepare.stac.search
    request = load_request(folder, params.selected)
    assert set(request.layers) == {m.name for m in params.selected}
    names = {place.name for place in places_of(request)}
    assert {"Zermatt", "Camargue"} < names
    assert len(names) > 10
    known = licences(folder, params.selected)
    assert set(known) == set(request.products)
    assert all(product["licence"] and product["attribution"] for product in known.values())
    StacSource(folder, params.prepare.patch_px, params.prepare.gsd_m[0], params.selected)


def test_every_declared_collection_can_be_asked_for(tmp_path):
    declared = declared_products()
    layers = set()
    for name, catalogue in declared.catalogues.items():
        for entry, collection in catalogue.collections.items():
            for layer in declared.products[collection.product or entry].layers:
                content = {
                    "catalogue": name, "products": {layer: entry}, "places": {"x": [8.0, 47.0]},
                    "side_m": 640.0, "dates": ["2021-06-01", "2021-08-31"], "acquisitions": 1,
                    "max_cloud": 40, "min_clear": 0.9, "tolerance_days": 6,
                }  # fmt: skip
                (tmp_path / SEARCH_FILE).write_text(yaml.safe_dump(content))
                request = load_request(tmp_path, [MODALITIES[layer]])
                assert request.layers == {layer: entry}
                layers.add(layer)
    assert layers == set(MODALITIES)


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
