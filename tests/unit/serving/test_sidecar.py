"""What a person sees who opens the files in QGIS: it reads them by GDAL, and so does this."""

import ctypes
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from serving_fixtures import ask, form, geotiff, make_source, serve_config

from mm_model.api import MANIFEST
from mm_model.calls import fill, generate
from mm_model.data import raster
from mm_model.data.sidecar import sidecar
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.scenes import SceneRequest, write_scene

LAND = MODALITIES["map"]


def class_names(path: Path) -> dict[int, str]:
    """Code → name, as GDAL tells them to a program; rasterio does not ask it for them."""
    (library,) = (Path(rasterio.__file__).parents[1] / "rasterio.libs").glob("libgdal*")
    gdal = ctypes.CDLL(str(library))
    for name, result, *arguments in (
        ("GDALOpen", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int),
        ("GDALGetRasterBand", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
        ("GDALGetRasterNoDataValue", ctypes.c_double, ctypes.c_void_p, ctypes.c_void_p),
        ("GDALClose", None, ctypes.c_void_p),
    ):
        function = getattr(gdal, name)
        function.restype, function.argtypes = result, arguments
    gdal.GDALGetRasterCategoryNames.restype = ctypes.POINTER(ctypes.c_char_p)
    gdal.GDALGetRasterCategoryNames.argtypes = [ctypes.c_void_p]
    gdal.GDALAllRegister()
    dataset = gdal.GDALOpen(str(path).encode(), 0)
    band = gdal.GDALGetRasterBand(dataset, 1)
    gdal.GDALGetRasterNoDataValue(band, None)  # GDAL looks beside the file when it is first asked
    names = gdal.GDALGetRasterCategoryNames(band)
    found, code = {}, 0
    while names and names[code] is not None:
        if names[code]:
            found[code] = names[code].decode()
        code += 1
    gdal.GDALClose(dataset)
    return found


EXPECTED = {c.code: c.name for c in LAND.classes}


@pytest.fixture(scope="module")
def app():
    return build_app(make_source(max_side_px=64), serve_config(max_side_px=64))


def test_gdal_tells_the_names_colours_and_units_of_an_answer(app, tmp_path):
    headers = {"Accept": "application/zip"}
    request = form({"sar": geotiff("sar")}, headers, target=["map", "dem"], steps=1)
    (answer,) = ask(app, request)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert set(archive.namelist()) == {MANIFEST, "map.tif", "map.tif.aux.xml", "dem.tif"}
        archive.extractall(tmp_path)
    assert class_names(tmp_path / "map.tif") == EXPECTED
    assert class_names(tmp_path / "dem.tif") == {}
    with rasterio.open(tmp_path / "map.tif") as land:
        assert land.colorinterp == (rasterio.enums.ColorInterp.palette,)
        shown = land.colormap(1)
        assert {code: shown[code] for code in EXPECTED} == LAND.color_table
        assert land.nodata == 0
        # The sidecar says nothing else: colours and tags are those of the file.
        assert land.tags()["MODALITY"] == "map"
    with rasterio.open(tmp_path / "dem.tif") as relief:
        assert (relief.descriptions, relief.units) == (("elevation",), ("m",))
        assert np.isnan(relief.nodata)


def test_one_map_comes_with_its_names_where_a_zip_is_wanted(app):
    fields = {"target": "map", "steps": 1}
    (plain,) = ask(app, form({"sar": geotiff("sar")}, **fields))
    assert plain.headers["content-type"] == "image/tiff"
    call = generate({}, ["map"]).into(Path("unused"))
    (zipped,) = ask(app, form({"sar": geotiff("sar")}, dict(call.headers), **fields))
    with zipfile.ZipFile(io.BytesIO(zipped.content)) as archive:
        assert archive.read("map.tif") == plain.content
        assert archive.read("map.tif.aux.xml") == sidecar(LAND)


def test_a_client_saves_what_lies_beside(app, tmp_path):
    call = generate({}, ["map"]).into(tmp_path)
    (answer,) = ask(app, form({"sar": geotiff("sar")}, dict(call.headers), target="map", steps=1))
    saved = call.read(answer.headers, io.BytesIO(answer.content))
    assert [path.name for path in saved.paths] == ["map.tif"]
    assert class_names(saved.paths[0]) == EXPECTED


def test_a_filled_map_has_the_names_and_colours_of_its_classes(app, tmp_path):
    # Two bands, so that the file itself has no place for colours.
    land = geotiff("map")
    fields = {"fill": "map", "steps": 1}
    (plain,) = ask(app, form({"map": land}, path="/v1/fill", **fields))
    assert plain.headers["content-type"] == "image/tiff"
    call = fill("map", {}, steps=1).into(tmp_path)
    headers = dict(call.headers)
    (answer,) = ask(app, form({"map": land}, headers, path="/v1/fill", **fields))
    saved = call.read(answer.headers, io.BytesIO(answer.content))
    assert [path.name for path in saved.paths] == ["map.tif"]
    assert saved.paths[0].read_bytes() == plain.content
    assert class_names(saved.paths[0]) == EXPECTED
    with rasterio.open(saved.paths[0]) as filled:
        assert filled.count == 2
        shown = filled.colormap(1)
        assert {code: shown[code] for code in EXPECTED} == LAND.color_table
        assert filled.colorinterp[0] is rasterio.enums.ColorInterp.palette


def test_whole_scenes_have_it_too(tmp_path):
    generator = make_source().served.generator
    (tmp_path / "sar.tif").write_bytes(geotiff("sar"))
    request = SceneRequest({"sar": tmp_path / "sar.tif"}, ("map",), steps=1)
    identity = make_source().served.identity
    written = write_scene(generator, request, identity, tmp_path / "out")
    assert [path.name for path in written] == ["map.tif"]
    assert class_names(written[0]) == EXPECTED
    assert raster.read_header(written[0]).band_names == LAND.band_names


def test_numbers_have_no_names():
    assert [m.name for m in MODALITIES.values() if sidecar(m)] == [
        m.name for m in MODALITIES.values() if m.is_categorical
    ]
