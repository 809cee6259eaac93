"""What goes over the line, and what goes wrong there."""

import json

import pytest
from stac_fixtures import PLACE, SCENE, assert_reflectance, lonlat_of_place, source, write_search

from mm_model.data.prepare import prepare
from mm_model.data.sources.stac.request import (
    LOCK_FILE,
)
from mm_model.errors import RasterError, ServiceError
from mm_model.modalities import MODALITIES


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
        assert len(mine) <= 4  # its size, its header, and its blocks of a row at once
        assert sum(a.sent for a in mine) < size / 2
    assert SCENE.height * SCENE.width > 25 * PLACE.height * PLACE.width


@pytest.mark.parametrize("what", [429, 500, 503, "truncate", "drop"])
@pytest.mark.parametrize("path", [r"^/$", "^/search$", r"red\.tif$", r"scl\.tif$", "^/token/"])
def test_what_fails_for_a_while_costs_nothing(clear, serve, tmp_path, path, what):
    server = serve([clear], token_s=3600)
    # Statuses are met by the libraries' own two repeats first, and by ours after these.
    own = isinstance(what, int) and path != "^/token/"
    server.fail(path, what, times=4 if own else 2)
    assert_reflectance(source(write_search(tmp_path, server)))
    assert server.faults[0].times == 0


def test_failure_in_the_middle_of_a_file_is_made_good(clear, serve, tmp_path):
    for number, what in enumerate((503, "truncate")):
        server = serve([clear])
        server.fail(r"nir\.tif$", what, times=2, skip=1)  # behind the header
        assert_reflectance(source(write_search(tmp_path / str(number), server)))
        assert server.faults[0].times == 0


def test_a_server_that_only_tells_sizes_is_no_file_of_another_format(clear, serve, tmp_path):
    server = serve([clear])
    made = source(write_search(tmp_path, server))
    (unit,) = made.units()
    server.fail(r"nir\.tif$", 503, times=10_000, method="GET")
    with pytest.raises(ServiceError, match=r"nir\.tif cannot be read"):
        list(made.read(unit))


@pytest.mark.parametrize("wait", ["1", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_server_that_asks_to_wait_is_heard(clear, serve, tmp_path, wait):
    server = serve([clear], token_s=3600)
    for path in (r"red\.tif$", "^/search$", "^/token/"):
        server.fail(path, 429, headers={"Retry-After": wait})
    assert_reflectance(source(write_search(tmp_path, server)))
    assert all(fault.times == 0 for fault in server.faults)


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
    assert len(json.loads((folder / LOCK_FILE).read_text())["places"]) == 2
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
