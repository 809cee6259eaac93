"""A declared grid beside observed layers, which are warped onto it."""

import dataclasses

import numpy as np
import pytest
from serving_fixtures import (
    GRID,
    ask,
    form,
    geotiff,
    make_generator,
    make_layer,
    make_source,
    refused,
    serve_config,
)

from mm_model.api import ModelIdentity
from mm_model.data import georeference, raster
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.generator import ObservedLayer, Request
from mm_model.serving.layers import onto
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import write_scene

# In another system, with other pixels, and with its left third beside the layer.
_LON, _LAT = georeference.to_lonlat(GRID.crs, *zip(GRID.xy(4, 0), strict=True))[0].tolist()
OTHER = Grid("EPSG:4326", (1.1e-4, 0.0, _LON - 6 * 1.1e-4, 0.0, -0.9e-4, _LAT), 17, 22)
FIELDS = {
    "width": OTHER.width,
    "height": OTHER.height,
    "crs": OTHER.crs,
    "transform": ",".join(map(repr, OTHER.transform)),
}


@pytest.fixture(scope="module")
def source():
    return make_source(max_side_px=64)


def test_the_answer_lies_on_the_declared_grid_to_the_last_digit(source):
    app = build_app(source, serve_config())
    asked = form({"sar": geotiff("sar"), "dem": geotiff("dem")}, target="map", steps=1, **FIELDS)
    (answer,) = ask(app, asked)
    assert answer.status_code == 200, answer.text
    found = raster.read_raster(answer.content)
    assert found.grid == OTHER
    assert not found.valid[:, :4].any()  # where no layer is, nothing is invented
    assert found.valid[:, 8:].mean() > 0.5


def test_it_is_what_comes_of_layers_that_lie_there_already(source):
    generator = source.served.generator
    layer = make_layer("sar")
    values, valid = onto(OTHER, "sar", layer, MODALITIES["sar"])
    there = ObservedLayer(values, valid, OTHER)
    wishes = {"targets": ("dem", "map"), "steps": 2}
    (declared,) = generator.generate([Request({"sar": layer}, grid=OTHER, **wishes)])
    (warped,) = generator.generate([Request({"sar": there}, **wishes)])
    assert declared.grid == warped.grid == OTHER
    np.testing.assert_array_equal(declared.valid, warped.valid)
    for name, drawn in declared.values.items():
        np.testing.assert_array_equal(drawn, warped.values[name])


def test_whole_scenes_lie_there_too(tmp_path):
    file = tmp_path / "sar.tif"
    file.write_bytes(geotiff("sar"))
    request = SceneRequest({"sar": file}, ("dem",), steps=1, grid=OTHER)
    model = ModelIdentity(name="mm-test", version="1")
    (written,) = write_scene(make_generator(), request, model, tmp_path / "out")
    found = raster.read_raster(written)
    (near,) = make_generator().generate(
        [Request({"sar": make_layer("sar")}, ("dem",), steps=1, grid=OTHER)]
    )
    assert found.grid == OTHER
    np.testing.assert_array_equal(found.valid, near.valid)


@pytest.mark.parametrize(
    ("changes", "layer_crs", "code", "words"),
    [
        ({"crs": None, "transform": None}, GRID.crs, "request", "crs and transform"),
        ({"transform": "1e-4,0,0,0,-1e-4,0"}, GRID.crs, "georeference", "does not overlap"),
        ({}, "", "georeference", "no reference system"),
        ({"transform": "0,0,15,0,0,45"}, GRID.crs, "georeference", "invertible"),
    ],
)
def test_what_cannot_be_brought_onto_it_is_refused(source, changes, layer_crs, code, words):
    fields = {k: v for k, v in {**FIELDS, **changes}.items() if v is not None}
    content = geotiff("sar", dataclasses.replace(GRID, crs=layer_crs))
    app = build_app(source, serve_config())
    (answer,) = ask(app, form({"sar": content}, target="dem", steps=1, **fields))
    assert words in str(refused(answer, 422, code))
