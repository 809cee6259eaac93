"""Filling and uncertainty over HTTP give what the library writes, and refuse what it refuses."""

import asyncio
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from rasterio.io import MemoryFile
from serving_fixtures import (
    GRID,
    ask,
    form,
    geotiff,
    make_layer,
    make_source,
    refused,
    serve_config,
)
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mm_model.api import Manifest, Provenance
from mm_model.data import raster
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.presence import while_present
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import GENERATED, write_scene

SOURCE = make_source(max_side_px=96)


def post(path, files, **fields):
    (response,) = ask(
        build_app(SOURCE, serve_config(max_side_px=96)), form(files, path=path, steps=1, **fields)
    )
    return response


def library(folder: Path, contents: dict[str, bytes], **asked) -> dict[str, bytes]:
    files = {name: folder / f"in_{name}.tif" for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    request = SceneRequest(files, steps=1, **asked)
    written = write_scene(SOURCE.served.generator, request, SOURCE.served.identity, folder / "out")
    return {path.name: path.read_bytes() for path in written}


def test_a_filled_layer_is_that_of_the_library_to_the_byte(tmp_path):
    contents = {"dem": geotiff("dem"), "sar": geotiff("sar", seed=1, hole=False)}
    response = post("/v1/fill", contents, fill="dem", seed=5)
    assert response.status_code == 200, response.text
    assert library(tmp_path, contents, fill="dem", seed=5) == {"dem.tif": response.content}
    found, layer = raster.read_raster(response.content), make_layer("dem")
    assert found.grid == GRID
    assert found.band_names == (*MODALITIES["dem"].band_names, GENERATED)
    np.testing.assert_array_equal(found.values[-1] == 0, layer.valid)
    np.testing.assert_array_equal(found.values[0][layer.valid], layer.values[0][layer.valid])
    assert Provenance.from_headers(response.headers).observed == ("sar", "dem")


def test_uncertainty_comes_as_bands_beside_the_samples(tmp_path):
    contents = {"sar": geotiff("sar")}
    asked = {"samples": 3, "seed": 2}
    response = post("/v1/generate", contents, target=["dem", "map"], uncertainty="true", **asked)
    assert response.status_code == 200, response.text
    expected = library(tmp_path, contents, targets=("dem", "map"), uncertainty=True, **asked)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        manifest = Manifest.model_validate_json(archive.read("manifest.json"))
        assert {f.name: archive.read(f.name) for f in manifest.files} == expected
        classes = {f"map_{k}.tif.aux.xml" for k in range(3)}  # their names, for GDAL and QGIS
        assert set(archive.namelist()) == {"manifest.json", *expected, *classes}
    assert {f.modality for f in manifest.files if f.sample is None} == {"dem", "map"}
    with MemoryFile(expected["map_uncertainty.tif"]) as memory, memory.open() as dataset:
        assert dataset.descriptions[-1] == "entropy"


@pytest.mark.parametrize(
    ("path", "files", "fields", "code"),
    [
        ("/v1/fill", {"dem": geotiff("dem", hole=False)}, {"fill": "dem"}, "request"),
        ("/v1/fill", {"dem": geotiff("dem")}, {}, "request"),
        ("/v1/fill", {"dem": geotiff("dem")}, {"fill": "sar"}, "request"),
        ("/v1/fill", {"dem": geotiff("sar")}, {"fill": "dem"}, "layer"),
        ("/v1/fill", {"dem": geotiff("dem")}, {"fill": "dem", "target": "sar"}, "request"),
        ("/v1/generate", {"sar": geotiff("sar")}, {"uncertainty": "true"}, "request"),
        ("/v1/generate", {"sar": geotiff("sar")}, {"uncertainty": "perhaps"}, "request"),
    ],
)
def test_what_cannot_be_is_refused(path, files, fields, code):
    refused(post(path, files, **fields), 422, code)


def test_who_leaves_ends_the_work():
    async def run():
        read, ended = asyncio.Event(), asyncio.Event()

        async def receive():
            await read.wait()
            return {"type": "http.disconnect"}

        async def work():
            try:
                read.set()
                await asyncio.sleep(60)
            finally:
                ended.set()

        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        with pytest.raises(HTTPException) as left:
            await while_present(request, work())
        return left.value.status_code, ended.is_set()

    assert asyncio.run(run()) == (499, True)
