"""The scene as a representation: of requests, and over HTTP."""

import datetime as dt
import io
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import torch
from serving_fixtures import (
    GRID,
    NAMES,
    ask,
    form,
    geotiff,
    make_bundle,
    make_layer,
    make_source,
    refused,
    serve_config,
)
from test_app import BAD, IN_PIXELS, SAR

from mm_model.api import SceneOrigin, SceneVector
from mm_model.conditions import NOTHING, Conditions, stack_features
from mm_model.data import raster
from mm_model.data.circumstances import complete
from mm_model.errors import LayerError, RequestError, UnknownModalityError
from mm_model.generative.sampler import mean_scene
from mm_model.modalities import MODALITIES
from mm_model.scene import Scene
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel
from mm_model.serving.generator import EmbedRequest, Generator

ODD = replace(GRID, height=27, width=45)  # no side is a multiple of 8
CELLS = (4, 6)


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture(scope="module")
def generator(bundle):
    return Generator(bundle, max_side_px=96, max_batch=16)  # large images are fewer to a batch


def one(generator, layers, **request):
    (embedding,) = generator.embed([EmbedRequest(layers, **request)])
    return embedding


def test_it_is_the_expected_scene_of_what_the_training_path_encodes(bundle, generator):
    layer = make_layer("sar", ODD)
    embedding = one(generator, {"sar": layer})
    scene = Scene(
        {"sar": torch.from_numpy(layer.values)[None]},
        {"sar": torch.from_numpy(layer.valid)[None, None]},
    )
    x, mask = bundle.model.codec.encode(scene)
    known = torch.from_numpy(stack_features([complete(NOTHING, ODD)]))
    expected = mean_scene(bundle.model, x, mask, conditions=known)[0].numpy()
    np.testing.assert_array_equal(embedding.scene, expected)
    assert embedding.scene.dtype == np.float32
    assert embedding.scene.shape == (bundle.model.scene_channels, *CELLS)
    assert embedding.grid == ODD.coarser(8)


def test_the_vector_tells_of_the_cells_where_anything_is_observed(generator):
    rgb, sar = make_layer("rgb", ODD, hole=False), make_layer("sar", ODD, hole=False)
    rgb.valid[:] = sar.valid[:] = False
    rgb.valid[0, 44] = True  # one pixel of the last, cut cell of the first row
    sar.valid[15:18, 2] = True  # on both sides of a border
    embedding = one(generator, {"rgb": rgb, "sar": sar})
    assert np.argwhere(embedding.valid).tolist() == [[0, 5], [1, 0], [2, 0]]
    cells = embedding.scene[:, [0, 1, 2], [5, 0, 0]]
    assert embedding.vector.dtype == np.float32
    np.testing.assert_allclose(
        embedding.vector, [*cells.mean(axis=1), *cells.std(axis=1)], rtol=1e-5, atol=1e-6
    )


def test_no_embedding_depends_on_others_in_the_batch(generator):
    requests = [
        EmbedRequest({"sar": make_layer("sar", ODD)}),
        EmbedRequest({"dem": make_layer("dem", ODD, 4)}, Conditions(date=dt.date(2024, 7, 1))),
        EmbedRequest({"rgb": make_layer("rgb", replace(GRID, height=17, width=31))}),
        EmbedRequest({n: make_layer(n, ODD) for n in NAMES}),  # all of them may be observed
        EmbedRequest({"sar": make_layer("sar", ODD)}, Conditions(latitude_deg=-60)),
    ]
    together = generator.embed(requests)
    for request, embedding in zip(requests, together, strict=True):
        (alone,) = generator.embed([request])
        np.testing.assert_array_equal(alone.scene, embedding.scene)
        np.testing.assert_array_equal(alone.vector, embedding.vector)
        assert alone.grid == embedding.grid
    assert not np.array_equal(together[0].vector, together[4].vector)


def test_order_of_layers_and_what_an_invalid_pixel_holds_change_nothing(generator):
    sar, dem = make_layer("sar", ODD), make_layer("dem", ODD)
    spoilt = replace(dem, values=np.where(dem.valid, dem.values, np.nan))
    first = one(generator, {"sar": sar, "dem": dem})
    second = one(generator, {"dem": spoilt, "sar": sar})
    np.testing.assert_array_equal(first.scene, second.scene)
    np.testing.assert_array_equal(first.vector, second.vector)


def test_no_date_is_assumed(generator):
    assert generator.prepare_embedding(EmbedRequest({"sar": make_layer("sar")})).conditions == (
        complete(NOTHING, GRID)
    )
    assert complete(NOTHING, GRID).date is None


def test_what_cannot_be_embedded_is_refused(generator):
    with pytest.raises(RequestError, match="send a GeoTIFF"):
        one(generator, {})
    with pytest.raises(UnknownModalityError, match="rgb, sar, dem, map"):
        one(generator, {"nir": make_layer("nir")})
    layer = make_layer("sar")
    with pytest.raises(LayerError, match="linear power"):
        one(generator, {"sar": replace(layer, values=10 ** (layer.values / 10))})


def test_it_can_be_given_up(generator):
    class LeftError(Exception):
        pass

    def check(_: float) -> None:
        raise LeftError

    prepared = generator.prepare_embedding(EmbedRequest({"sar": make_layer("sar")}))
    with pytest.raises(LeftError):
        generator.scenes([prepared], check)


# --- over HTTP -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    return make_source(max_side_px=96)


@pytest.fixture(scope="module")
def app(source):
    return build_app(source, serve_config(max_side_px=96))


def embed(app, files, accept="*/*", **fields):
    (response,) = ask(app, form(files, {"Accept": accept}, "/v1/embed", **fields))
    return response


def test_the_scene_comes_as_a_geotiff_of_cells(app, generator):
    layer = make_layer("sar", ODD)
    layer.valid[:17, :9] = False  # the first two cells of its first column know nothing
    upload = raster.write_geotiff(None, layer.values, layer.valid, ODD, MODALITIES["sar"])
    response = embed(app, {"sar": upload}, date="2024-01-15")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/tiff"
    known = Conditions(date=dt.date(2024, 1, 15))
    expected = one(generator, {"sar": layer}, conditions=known)
    with rasterio.MemoryFile(response.content) as memory, memory.open() as dataset:
        a, b, c, d, e, f = ODD.transform
        assert tuple(dataset.transform)[:6] == (8 * a, 8 * b, c, 8 * d, 8 * e, f)
        assert dataset.crs.to_epsg() == 32633
        assert dataset.shape == CELLS
        assert set(dataset.dtypes) == {"float32"}
        assert np.isnan(dataset.nodata)
        assert dataset.descriptions[:3] == ("z00", "z01", "z02")
        assert dataset.count == len(expected.scene)
        values, tags = dataset.read(), dataset.tags()
    np.testing.assert_array_equal(values, np.where(expected.valid, expected.scene, np.nan))
    assert np.argwhere(np.isnan(values[0])).tolist() == [[0, 0], [1, 0]]
    origin = SceneOrigin.from_headers(response.headers)
    assert origin.tags().items() <= tags.items()
    assert (origin.observed, origin.conditions) == (("sar",), complete(known, ODD))
    assert {"MM_BUNDLE_ID", "MM_OBSERVED", "MM_MODEL_VERSION"} <= tags.keys()


def test_the_vector_comes_as_json_and_both_as_a_zip(app, generator):
    files = {"dem": geotiff("dem", ODD), "sar": geotiff("sar", ODD)}
    response = embed(app, files, "application/json")
    assert response.headers["content-type"] == "application/json"
    record = SceneVector.model_validate_json(response.content)
    layers = {n: make_layer(n, ODD) for n in files}
    assert record.vector == tuple(one(generator, layers).vector.tolist())
    assert record.observed == ("sar", "dem")  # the model's order
    both = embed(app, files, "application/zip")
    with zipfile.ZipFile(io.BytesIO(both.content)) as archive:
        assert archive.namelist() == ["scene.tif", "vector.json"]
        assert archive.read("vector.json") == response.content
        assert archive.read("scene.tif") == embed(app, files).content


BAD_HERE = {
    **{case: BAD[case] for case, (_, fields, *_) in BAD.items() if not fields},
    "field as file": ({"date": b"1"}, {}, 422, "request"),
    "a field of the other": ({"sar": SAR}, {"seed": 1}, 422, "request"),
    "half a sun": BAD["half a sun"],
    "no such day": BAD["no such day"],
    "beyond the pole": BAD["beyond the pole"],
}
del BAD_HERE["all observed"]  # which is welcome here
del BAD_HERE["nothing at all"]  # a form without parts is none


@pytest.mark.parametrize("case", BAD_HERE)
def test_uploads_are_held_to_the_same_rules(app, case, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("pixels were decoded")

    if case not in IN_PIXELS:
        monkeypatch.setattr(raster, "read_raster", decode)
    files, fields, status, code = BAD_HERE[case]
    problem = refused(embed(app, files, **fields), status, code)
    assert problem.remedy or problem.allowed


def test_callers_of_both_operations_share_the_queue_and_nobody_notices(source):
    app = build_app(source, serve_config(max_batch=3, batch_wait_ms=20))
    uploads = [{"sar": geotiff("sar", ODD, seed=k)} for k in range(4)]
    requests = [form(files, path="/v1/embed") for files in uploads]
    requests += [form(files, target="dem", steps=1) for files in uploads]
    together = ask(app, *requests)
    alone = [ask(app, request)[0] for request in requests]
    assert [r.status_code for r in together] == [200] * 8
    assert [r.content for r in alone] == [r.content for r in together]
    (page,) = ask(app, ("GET", "/metrics", {}))
    counts = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if line[0] != "#")
    for operation in ("embed", "generate"):
        assert (
            counts[f'mm_requests_total{{operation="{operation}",status="200",version="3"}}']
            == "8.0"
        )
        assert counts[f'mm_request_seconds_count{{operation="{operation}",version="3"}}'] == "8.0"
    assert float(counts["mm_batch_size_count"]) < 16


def test_admission_and_deadline_are_the_same(monkeypatch):
    source, entered = make_source(), threading.Event()

    def scenes(requests, check):
        entered.set()
        while True:  # until every caller has left
            check()

    monkeypatch.setattr(source.served.generator, "scenes", scenes)
    app = build_app(source, serve_config(max_queued=1, deadline_s=0.5))
    request = form({"sar": SAR}, path="/v1/embed")
    answers = sorted(ask(app, request, request), key=lambda r: r.status_code)
    refused(answers[0], 429, "overloaded")
    refused(answers[1], 504, "deadline")
    assert entered.is_set()
    empty = build_app(FixedModel(None), serve_config())
    refused(ask(empty, request)[0], 503, "not_ready")
