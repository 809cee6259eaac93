"""Several files of one modality, of other dates or neighbouring tiles, wherever files are taken."""

import asyncio
import dataclasses
import io
import time
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from rasterio.io import MemoryFile
from rasterio.transform import Affine
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

from mm_model.api import AlignedManifest, JobState
from mm_model.client import AsyncClient, Client
from mm_model.data import georeference, raster
from mm_model.data.strips import strips
from mm_model.errors import GeoreferenceError, LayerError, RequestError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.generator import EmbedRequest, ObservedLayer, Request
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.jobs.store import JobStore
from mm_model.serving.jobs.worker import UPLOADS, Worker
from mm_model.serving.layers import onto
from mm_model.serving.metrics import Metrics
from mm_model.serving.observed import ObservedFiles
from mm_model.serving.overlay import own_grid
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import write_scene

SOURCE = make_source(max_side_px=96)
GENERATOR = SOURCE.served.generator
APP = build_app(SOURCE, serve_config(max_side_px=96))
WEST, EAST = GRID.window(0, 0, 24, 17), GRID.window(0, 17, 24, 23)


def dates(name: str = "rgb") -> tuple[ObservedLayer, ObservedLayer]:
    """June, with clouds in the west; August, with others in the middle, which share some pixels."""
    june, august = (make_layer(name, GRID, seed, hole=False) for seed in (1, 2))
    june.valid[3:20, :14] = False
    august.valid[10:, 9:22] = False
    return june, august


def encoded(name: str, layer: ObservedLayer) -> bytes:
    content = raster.write_geotiff(None, layer.values, layer.valid, layer.grid, MODALITIES[name])
    assert content is not None
    return content


def part(layer: ObservedLayer, row: int, col: int, height: int, width: int) -> ObservedLayer:
    inside = slice(row, row + height), slice(col, col + width)
    grid = layer.grid.window(row, col, height, width)
    return ObservedLayer(layer.values[:, *inside], layer.valid[inside], grid)


def seen(**given):
    """What the model sees of layers: grid, and name → values and mask."""
    aligned = GENERATOR.prepare_embedding(EmbedRequest(given))
    return aligned.grid, aligned.observed


def written(folder: Path, name: str, layers) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{name}_{k}.tif" for k in range(len(layers)))
    for path, layer in zip(paths, layers, strict=True):
        path.write_bytes(encoded(name, layer))
    return paths


def library(folder: Path, observed, **asked) -> dict[str, bytes]:
    request = SceneRequest(observed, **{"steps": 1, **asked})
    paths = write_scene(GENERATOR, request, SOURCE.served.identity, folder)
    return {path.name: path.read_bytes() for path in paths}


def post(path: str, files, **fields):
    (response,) = ask(APP, form(files, path=path, **fields))
    return response


@pytest.mark.parametrize("name", ["rgb", "sar", "map"])
def test_the_first_that_knows_a_pixel_gives_it_with_all_bands(name):
    june, august = dates(name)
    grid, observed = seen(**{name: (june, august)})
    values, valid = observed[name]
    assert grid == GRID
    np.testing.assert_array_equal(valid, june.valid | august.valid)
    assert not valid.all()
    np.testing.assert_array_equal(values[:, june.valid], june.values[:, june.valid])
    second = august.valid & ~june.valid
    assert second.any()
    np.testing.assert_array_equal(values[:, second], august.values[:, second])
    reversed_values, reversed_valid = seen(**{name: [august, june]})[1][name]
    np.testing.assert_array_equal(reversed_valid, valid)
    np.testing.assert_array_equal(reversed_values[:, august.valid], august.values[:, august.valid])


def test_one_in_a_sequence_is_one_alone(tmp_path):
    """To the byte, in memory and from files."""
    sar, dem = make_layer("sar"), make_layer("dem", GRID.window(4, 5, 30, 20).resized(20, 31), 3)
    wishes = {"targets": ("rgb", "map"), "samples": 2, "seed": 5, "steps": 2}
    alone, listed = GENERATOR.generate(
        [
            Request({"sar": sar, "dem": dem}, **wishes),
            Request({"sar": [sar], "dem": (dem,)}, **wishes),
        ]
    )
    for name, values in alone.values.items():
        np.testing.assert_array_equal(values, listed.values[name])
    (one,), (other,) = written(tmp_path, "sar", [sar]), written(tmp_path, "dem", [dem])
    found = library(tmp_path / "a", {"sar": one, "dem": other}, targets=("rgb",))
    assert found == library(tmp_path / "b", {"sar": [one], "dem": [other]}, targets=("rgb",))


@pytest.mark.parametrize("name", ["sar", "dem", "map"])
def test_neighbouring_tiles_are_the_scene_that_they_were_cut_from(name, tmp_path):
    """To the last bit: nothing is resampled, also decibels are not."""
    whole = make_layer(name)
    tiles = [part(whole, 0, 0, 24, 17), part(whole, 0, 17, 24, 23)]
    for order in (tiles, tiles[::-1], [tiles[0], tiles[1], tiles[0]]):
        grid, observed = seen(**{name: order})
        values, valid = observed[name]
        np.testing.assert_allclose(grid.transform, GRID.transform, rtol=1e-15)
        assert (grid.crs, grid.shape) == (GRID.crs, GRID.shape)
        np.testing.assert_array_equal(valid, whole.valid)
        np.testing.assert_array_equal(values[:, valid], whole.values[:, valid])
        files = ObservedFiles({name: written(tmp_path, name, order)}, GENERATOR)
        assert files.grid == grid
        for row, rows in strips(24, 7):
            some, known = files.read(row, rows)[name]
            np.testing.assert_array_equal(known, valid[row : row + rows])
            np.testing.assert_array_equal(some[:, known], values[:, row : row + rows][:, known])


SHIFTED = dataclasses.replace(
    EAST, transform=(*EAST.transform[:2], EAST.transform[2] + 5.05, *EAST.transform[3:])
)
FINE = GRID.window(0, 6, 24, 20).resized(48, 40)
OTHER_ZONE = georeference.metric_grid(GRID, "EPSG:32632", 10.0)


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([GRID, GRID], GRID),
        ([WEST, EAST], GRID),
        ([GRID, GRID.window(5, 5, 16, 16)], GRID),  # inside
        ([WEST, GRID.window(20, 12, 16, 20)], GRID.window(0, 0, 36, 32)),  # a corner of neither
        # Only the second of them joins the others.
        ([WEST, GRID.window(0, 33, 24, 7), GRID.window(0, 17, 24, 16)], GRID),
        ([WEST, GRID.window(0, 18, 24, 22)], WEST),  # a column lies between them
        ([WEST, SHIFTED], WEST),  # half a pixel off
        ([WEST, OTHER_ZONE], WEST),
        ([WEST, FINE], FINE),  # the finest
        ([WEST, EAST.resized(12, 12)], WEST),  # coarser
    ],
)  # fmt: skip
def test_the_grid_is_that_of_the_first_of_the_finest_and_of_what_lies_beside_it(grids, expected):
    found = own_grid("rgb", grids)
    assert (found.crs, found.shape) == (expected.crs, expected.shape)
    np.testing.assert_allclose(found.transform, expected.transform, rtol=1e-14)


def test_a_transform_of_few_digits_is_still_of_the_same_pixels():
    a, _, c, _, e, f = EAST.transform
    rounded = dataclasses.replace(EAST, transform=(round(a, 6), 0, round(c, 3), 0, e, round(f, 3)))
    assert rounded != EAST
    assert own_grid("rgb", [WEST, rounded]) == GRID
    # Half a per mille of a pixel's size adds up along the side.
    longer = dataclasses.replace(EAST, transform=(a * 1.0005, 0, c, 0, e, f))
    assert own_grid("rgb", [WEST, longer]) == WEST


def test_files_of_other_systems_and_sizes_fill_what_the_first_lacks(tmp_path):
    june, _ = dates("dem")
    other = make_layer("dem", OTHER_ZONE.resized(OTHER_ZONE.height // 2, OTHER_ZONE.width // 2), 4)
    other.values[0] = np.add.outer(np.arange(other.grid.height), np.arange(other.grid.width)) * 9
    other.valid[:] = True
    expected, known = onto(GRID, "dem", other, MODALITIES["dem"])
    grid, observed = seen(dem=[june, other])
    values, valid = observed["dem"]
    assert grid == GRID
    np.testing.assert_array_equal(valid, june.valid | known)
    np.testing.assert_array_equal(values[:, june.valid], june.values[:, june.valid])
    second = known & ~june.valid
    assert second.sum() > 100
    np.testing.assert_array_equal(values[:, second], expected[:, second])
    files = ObservedFiles({"dem": written(tmp_path, "dem", [june, other])}, GENERATOR)
    some, mask = files.read(0, 24)["dem"]
    np.testing.assert_array_equal(some[:, june.valid], june.values[:, june.valid])
    assert (mask == valid).mean() > 0.99  # warped exactly, not by an eighth of a pixel
    both = mask & second
    np.testing.assert_allclose(some[:, both], expected[:, both], atol=4)


def test_numbers_of_one_file_are_not_cut_to_the_type_of_another(tmp_path):
    """Whole metres on disk, then fractions of them."""
    whole, fine = dates("dem")
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=24, width=40, count=1, dtype="int16", crs=GRID.crs,
            transform=Affine(*GRID.transform), nodata=-999,
        ) as file:  # fmt: skip
            file.write(np.where(whole.valid, whole.values, -999).astype(np.int16))
        first = bytes(memory.getbuffer())
    response = post("/v1/align", {"dem": [first, encoded("dem", fine)]})
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        found = raster.read_raster(archive.read("dem.tif"))
    second = fine.valid & ~whole.valid
    np.testing.assert_array_equal(found.values[0][second], fine.values[0][second])
    np.testing.assert_array_equal(
        found.values[0][whole.valid], whole.values[0][whole.valid].astype(np.int16)
    )


def test_a_declared_grid_takes_tiles_that_lie_apart_and_has_no_seam():
    whole = make_layer("dem", GRID, hole=False)
    # A gradient, which any resampling keeps.
    whole.values[0] = np.add.outer(np.arange(24) * 3, np.arange(40) * 5) + 100
    apart = [part(whole, 0, 0, 24, 17), part(whole, 0, 23, 24, 17)]
    with pytest.raises(GeoreferenceError, match=r"dem \(2 of 2\) does not overlap"):
        seen(dem=apart)
    tiles = [part(whole, 0, 0, 24, 17), part(whole, 0, 17, 24, 23)]
    lon, lat = georeference.to_lonlat(GRID.crs, *zip(GRID.xy(1, 1), strict=True))[0].tolist()
    declared = Grid("EPSG:4326", (1.1e-4, 0.0, lon, 0.0, -0.8e-4, lat), 24, 30)
    asked = {"targets": ("map",), "grid": declared}
    one, both, gap = (
        GENERATOR.prepare(Request({"dem": given}, **asked)) for given in (whole, tiles, apart)
    )
    assert one.grid == both.grid == gap.grid == declared
    np.testing.assert_array_equal(both.valid, one.valid)
    values, expected = both.observed["dem"][0], one.observed["dem"][0]
    # At the edge of a tile there is nothing to interpolate with: half a step of the gradient.
    assert np.abs(values - expected)[:, one.valid].max() < 5
    assert 0 < (one.valid & ~gap.valid).sum() < one.valid.sum() / 3


def wrong_second(kind: str) -> tuple[str, ObservedLayer | bytes]:
    """What the second file is, and what the problem calls it."""
    sar = make_layer("sar", GRID, 3)
    return {
        "no GeoTIFF": ("part sar (2 of 2)", b"II*\0 and no more"),
        "no TIFF": ("part sar (2 of 2)", b"nothing"),
        "another modality": ("part sar (2 of 2): bands", geotiff("dem")),
        "too large": (
            "part sar (2 of 2): height x width", geotiff("sar", GRID.window(0, 0, 97, 20))
        ),
        "linear power": (
            "layer sar (2 of 2), band VV: unit",
            dataclasses.replace(sar, values=10 ** (sar.values / 10)),
        ),
        "nothing known": (
            "layer sar (2 of 2)", dataclasses.replace(sar, valid=np.zeros(GRID.shape, np.bool_))
        ),
        "elsewhere": (
            "layer sar (2 of 2) does not overlap",
            dataclasses.replace(sar, grid=Grid(GRID.crs, (10, 0, 7e5, 0, -10, 55e5), 24, 40)),
        ),
        "nowhere": (
            "layer sar (2 of 2) has no reference system",
            dataclasses.replace(sar, grid=Grid("", GRID.transform, 24, 40)),
        ),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["no GeoTIFF", "no TIFF", "another modality", "too large", "linear power", "nothing known",
     "elsewhere", "nowhere"],
)  # fmt: skip
def test_a_wrong_file_is_named_by_its_turn(kind):
    said, second = wrong_second(kind)
    content = second if isinstance(second, bytes) else encoded("sar", second)
    files = {"dem": geotiff("dem"), "sar": [geotiff("sar", hole=False), content]}
    for path, fields in (
        ("/v1/generate", {"target": "map", "steps": 1}),
        ("/v1/align", {}),
        ("/v1/embed", {}),
        ("/v1/fill", {"fill": "dem", "steps": 1}),
    ):
        response = post(path, files, **fields)
        assert 400 <= response.status_code < 500
        assert response.json()["detail"].startswith(said), (path, response.json())


def test_all_files_together_may_hold_what_one_of_each_modality_may():
    sides = Grid(GRID.crs, GRID.transform, 96, 90)
    radar = geotiff("sar", sides)
    # Seven bands are known: rgb, sar, dem and map.
    assert post("/v1/align", {"sar": [radar] * 3}).status_code == 200
    for path, fields in (("/v1/align", {}), ("/v1/fill", {"fill": "sar"})):
        problem = refused(post(path, {"sar": [radar] * 4}, **fields), 413, "too_large")
        assert "job" in problem.remedy


def test_the_endpoint_answers_two_dates_as_the_library_does():
    june, august = dates()
    files = {"rgb": [encoded("rgb", june), encoded("rgb", august)]}
    response = post("/v1/align", files)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        manifest = AlignedManifest.model_validate_json(archive.read("manifest.json"))
        found = raster.read_raster(archive.read("rgb.tif"))
        assert len(archive.namelist()) == 2
    assert manifest.origin.observed == ("rgb",)
    values, valid = seen(rgb=(june, august))[1]["rgb"]
    np.testing.assert_array_equal(found.valid, valid)
    np.testing.assert_array_equal(found.values[:, valid], values[:, valid])
    merged = encoded("rgb", ObservedLayer(values, valid, GRID))
    for path, fields in (("/v1/generate", {"target": "dem", "seed": 4}), ("/v1/embed", {})):
        both, one = post(path, files, **fields), post(path, {"rgb": merged}, **fields)
        assert both.status_code == one.status_code == 200
        assert both.content == one.content
    turned = post("/v1/generate", {"rgb": files["rgb"][::-1]}, target="dem", seed=4)
    assert turned.content != post("/v1/generate", files, target="dem", seed=4).content


def test_filling_generates_only_what_no_file_knows(tmp_path):
    june, august = dates()
    tile = make_layer("rgb", GRID.window(24, 4, 18, 25), 5, hole=False)  # below the others
    given = {
        "rgb": written(tmp_path, "rgb", [june, august, tile]),
        "dem": written(tmp_path, "dem", [make_layer("dem", hole=False)]),
    }
    files = {name: [path.read_bytes() for path in paths] for name, paths in given.items()}
    response = post("/v1/fill", files, fill="rgb", steps=1, seed=6)
    assert response.status_code == 200, response.text
    assert library(tmp_path / "out", given, fill="rgb", seed=6) == {"rgb.tif": response.content}
    found = raster.read_raster(response.content)
    assert found.grid == GRID.window(0, 0, 42, 40)
    known = np.zeros((42, 40), np.bool_)
    known[:24], known[24:, 4:29] = june.valid | august.valid, True
    np.testing.assert_array_equal(found.values[3] == 0, known)
    second = august.valid & ~june.valid
    np.testing.assert_array_equal(found.values[:3, :24][:, june.valid], june.values[:, june.valid])
    np.testing.assert_array_equal(found.values[:3, :24][:, second], august.values[:, second])
    np.testing.assert_array_equal(found.values[:3, 24:, 4:29], tile.values)
    # Together they have no hole: there is nothing to fill.
    full = [encoded("rgb", june), geotiff("rgb", seed=2, hole=False)]
    problem = refused(post("/v1/fill", {"rgb": full}, fill="rgb"), 422, "request")
    assert problem.got == "no hole: every pixel is known to one of its files"
    assert "gdal_merge.py" in problem.remedy
    # Two that are whole make a corner of neither.
    corner = [
        geotiff("rgb", WEST, hole=False),
        geotiff("rgb", GRID.window(12, 17, 24, 23), 1, False),
    ]
    response = post("/v1/fill", {"rgb": corner}, fill="rgb", steps=1)
    assert raster.read_raster(response.content).values[3].sum() == 12 * 17 + 12 * 23


class InProcess(httpx.BaseTransport):
    """The real application behind a synchronous client."""

    def __init__(self, app):
        self._app = app

    def handle_request(self, request):
        request.read()
        headers = {k: v for k, v in request.headers.items() if k != "host"}
        sent = {"content": request.content, "headers": headers}
        (answer,) = ask(self._app, (request.method, request.url.path, sent))
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def test_a_job_and_both_clients_take_two_dates(tmp_path):
    app = build_app(
        SOURCE, serve_config(max_side_px=96), jobs=JobsPlace(tmp_path / "jobs", "", "mm-test")
    )
    tall = Grid("EPSG:32633", (10.0, 0.0, 500_030.0, 0.0, -10.0, 4_999_950.0), 300, 44)
    june, august = make_layer("sar", tall, 1), make_layer("sar", tall, 2, hole=False)
    august.valid[290:, 5:] = False
    june.valid[280:] = False
    both = written(tmp_path, "sar", [june, august])
    dem = written(tmp_path, "dem", [make_layer("dem", tall.window(0, 0, 90, 44), 3)])
    asked = {"seed": 3, "steps": 1}
    with Client("http://test", transport=InProcess(app)) as client:
        job = client.start_job({"sar": both, "dem": dem[0]}, fill="sar", **asked)
        while (now := client.job(job.id)).state not in (JobState.DONE, JobState.FAILED):
            time.sleep(0.2)
        assert now.problem is None
        path = client.save_result(job.id, tmp_path / "result")
        larger = make_source(max_side_px=2048).served
        request = SceneRequest({"sar": both, "dem": dem}, fill="sar", **asked)
        (expected,) = write_scene(larger.generator, request, larger.identity, tmp_path / "lib")
        assert path.read_bytes() == expected.read_bytes()
        found = raster.read_raster(path)
        second = august.valid & ~june.valid
        np.testing.assert_array_equal(found.values[2] == 0, june.valid | august.valid)
        np.testing.assert_array_equal(found.values[:2][:, second], august.values[:, second])
        assert not (tmp_path / "jobs" / job.id / "uploads").exists()
        with pytest.raises(LayerError, match=r"sar \(2 of 2\): bands"):
            client.start_job({"sar": (both[0], dem[0])}, ["map"], **asked)
        with pytest.raises(RequestError, match="files of sar"):
            client.start_job({"sar": ()}, ["map"], **asked)
        june, august = (encoded("rgb", layer) for layer in dates())
        (tmp_path / "june.tif").write_bytes(june)
        made = client.generate({"rgb": [tmp_path / "june.tif", august]}, ["dem"], **asked)
        embedded = client.embed({"rgb": (june, august)})
        filled = client.fill_to(tmp_path / "filled", "rgb", {"rgb": [june, august]}, **asked)

    async def ask_again():
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://test", transport=transport) as client:
            return (
                await client.generate({"rgb": (june, august)}, ["dem"], **asked),
                await client.embed({"rgb": [june, august]}),
                await client.fill("rgb", {"rgb": [june, august]}, **asked),
            )

    again = asyncio.run(ask_again())
    assert (again[0].files, again[1].files) == (made.files, embedded.files)
    assert (
        made.files["dem.tif"]
        == post("/v1/generate", {"rgb": [june, august]}, target="dem", **asked).content
    )
    assert raster.read_raster(filled.paths[0]).valid.all()


def test_a_job_that_was_queued_before_there_could_be_several_is_still_done(tmp_path):
    """Its one file lies where a modality's first one lies."""
    config = serve_config(max_side_px=96).jobs
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db", "mm-test")
    uploads = tmp_path / ("a" * 32) / UPLOADS
    uploads.mkdir(parents=True)
    (uploads / "sar").write_bytes(geotiff("sar"))
    store.add("a" * 32, "", [("target", "dem"), ("steps", "1")], ["sar"], 0)
    worker = Worker(store, tmp_path, SOURCE, config, Metrics())
    worker.start()
    try:
        while (job := store.get("a" * 32)).state not in (JobState.DONE, JobState.FAILED):
            time.sleep(0.1)
    finally:
        worker.close()
    assert (job.state, job.problem) == (JobState.DONE, None)
    store.close()
