"""The HTTP interface, over ASGI, with a real model."""

import asyncio
import io
import json
import threading
import zipfile

import httpx
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from serving_fixtures import (
    GRID,
    NAMES,
    PATCH_PX,
    ask,
    form,
    geotiff,
    make_layer,
    make_source,
    refused,
    serve_config,
)

from mm_model import errors
from mm_model.api import STATUS, Manifest, Problem, Provenance, error_classes, error_of, problem_of
from mm_model.conditions import NOTHING
from mm_model.data import raster
from mm_model.data.circumstances import complete
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel
from mm_model.serving.generator import Request

TIFF = "image/tiff"


@pytest.fixture(scope="module")
def source():
    return make_source(max_side_px=96)


def generate(source, files=None, headers=None, config=None, **fields):
    request = form(files, headers, **{"steps": 1, **fields})
    (response,) = ask(build_app(source, config or serve_config(max_side_px=96)), request)
    return response


def test_one_target_comes_as_a_geotiff_with_its_georeference_and_provenance(source):
    response = generate(source, {"sar": geotiff("sar")}, target="map", seed=7, steps=2)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == TIFF
    provenance = Provenance.from_headers(response.headers)
    assert provenance == Provenance(
        model="mm-test", model_version="3", run_id="f00d", observed=("sar",), targets=("map",),
        samples=1, seed=7, steps=2, conditions=complete(NOTHING, GRID),
    )  # fmt: skip
    with rasterio.MemoryFile(response.content) as memory, memory.open() as dataset:
        assert tuple(dataset.transform)[:6] == GRID.transform
        assert dataset.crs.to_epsg() == 32633
        assert dataset.shape == GRID.shape
        assert dataset.dtypes == ("uint8",)
        assert dataset.nodata == 0
        assert dataset.descriptions == MODALITIES["map"].band_names
        assert dataset.colormap(1)[10] == (0, 100, 0, 255)
        assert provenance.tags().items() <= dataset.tags().items()
        codes = dataset.read(1)
    valid = make_layer("sar").valid
    assert (codes[~valid] == 0).all()
    assert set(np.unique(codes[valid])) <= set(MODALITIES["map"].class_codes)


def test_http_gives_the_sample_that_the_library_gives(source):
    response = generate(source, {"sar": geotiff("sar")}, target="dem", seed=3, steps=2)
    layer = make_layer("sar")
    request = Request({"sar": layer}, ("dem",), seed=3, steps=2)
    (result,) = source.served.generator.generate([request])
    found = raster.read_raster(response.content)
    np.testing.assert_array_equal(found.valid, layer.valid)
    np.testing.assert_array_equal(
        found.values[:, layer.valid], result.values["dem"][0][:, layer.valid]
    )


def test_several_come_as_a_zip_with_a_manifest(source):
    response = generate(source, {"sar": geotiff("sar")}, samples=2, seed=1)
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        manifest = Manifest.model_validate_json(archive.read("manifest.json"))
        class_names = [f"map_{k}.tif.aux.xml" for k in (0, 1)]
        assert sorted(archive.namelist()) == sorted(
            ["manifest.json", *(file.name for file in manifest.files), *class_names]
        )
        assert [(f.modality, f.sample) for f in manifest.files] == [
            (name, k) for name in ("rgb", "dem", "map") for k in (0, 1)
        ]
        assert manifest.transform == GRID.transform
        for file in manifest.files:
            found = raster.read_raster(archive.read(file.name))
            assert found.grid == GRID
            assert found.band_names == MODALITIES[file.modality].band_names
            assert found.tags["MM_SAMPLE"] == str(file.sample)
    again = generate(source, {"sar": geotiff("sar")}, samples=2, seed=1)
    assert again.content == response.content


def test_a_picture_is_given_on_demand(source):
    response = generate(source, {"sar": geotiff("sar")}, {"Accept": "image/png"}, samples=2)
    assert response.headers["content-type"] == "image/png"
    assert response.content.startswith(b"\x89PNG\r\n")
    width, height = np.frombuffer(response.content[16:24], ">u4")
    assert (height, width) == (3 * GRID.height + 2 * 4, 2 * GRID.width + 4)


def test_nothing_observed(source):
    fields = {"width": 31, "height": 18, "crs": "EPSG:32633", "transform": "10,0,5e5,0,-10,5e6"}
    response = generate(source, target="rgb", **fields)
    assert response.status_code == 200, response.text
    found = raster.read_header(response.content)
    assert found.grid == Grid("EPSG:32633", (10, 0, 5e5, 0, -10, 5e6), 18, 31)
    nowhere = generate(source, target=["rgb", "map"], width=16, height=16)
    assert nowhere.headers["content-type"] == "application/zip"


def test_bands_go_by_name_and_a_declared_scale_is_applied(source):
    layer = make_layer("sar", hole=False)
    raw = np.round(layer.values[::-1] * 100).astype(np.int16)  # VH first, in hundredths of a dB
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=24, width=40, count=2, dtype="int16", crs="EPSG:32633",
            transform=Affine(*GRID.transform),
        ) as dataset:  # fmt: skip
            dataset.write(raw)
            dataset.descriptions = ("VH", "VV")
            dataset.scales, dataset.offsets = (0.01, 0.01), (0.0, 0.0)
        upload = memory.read()
    from mm_model.serving.uploads import read_layers

    generator = source.served.generator
    (read,) = read_layers({"sar": upload}, generator)["sar"]
    np.testing.assert_allclose(read.values, raw[::-1] / 100, rtol=1e-6)


def test_callers_share_batches_and_nobody_notices(source):
    app = build_app(source, serve_config(max_batch=3, batch_wait_ms=20))
    requests = [
        form({"sar": geotiff("sar", seed=k)}, target="dem", seed=k, steps=1) for k in range(7)
    ]
    together = ask(app, *requests)
    assert all(r.status_code == 200 for r in together)
    alone = [ask(app, request)[0] for request in requests]
    assert [r.content for r in alone] == [r.content for r in together]
    (page,) = ask(app, ("GET", "/metrics", {}))
    counts = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if line[0] != "#")
    assert counts['mm_requests_total{operation="generate",status="200",version="3"}'] == "14.0"
    # Seven at once are three batches, then seven of one each.
    assert float(counts["mm_batch_size_count"]) < 14
    assert counts['mm_model_info{model="mm-test",run_id="f00d",version="3"}'] == "1.0"


def vrt() -> bytes:
    return b"""<VRTDataset rasterXSize="40" rasterYSize="24">
    <VRTRasterBand dataType="Byte" band="1">
    <SimpleSource><SourceFilename relativeToVRT="0">/etc/passwd</SourceFilename></SimpleSource>
    </VRTRasterBand></VRTDataset>"""


def sparse(side: int, bands: int = 2, dtype: str = "float32", **options) -> bytes:
    """A file that declares much and holds nothing."""
    with rasterio.MemoryFile() as memory:
        profile = {"driver": "GTiff", "height": side, "width": side, "count": bands, "dtype": dtype}
        with memory.open(**profile, sparse_ok=True, compress="deflate", **options):
            pass
        return memory.read()


SAR = geotiff("sar")
SIDES = {"width": 32, "height": 32}
BAD = {
    "not a TIFF": ({"sar": b"%PDF-1.7 nothing of the kind"}, {}, 415, "media_type"),
    "empty": ({"sar": b""}, {}, 415, "media_type"),
    "VRT": ({"sar": vrt()}, {}, 415, "media_type"),
    "signature alone": ({"sar": b"II*\0" + bytes(60)}, {}, 415, "media_type"),
    "truncated header": ({"sar": SAR[:60]}, {}, 415, "media_type"),
    "truncated pixels": ({"sar": SAR[: len(SAR) // 2]}, {}, 415, "media_type"),
    "huge": ({"sar": sparse(60_000, tiled=True)}, {}, 413, "too_large"),
    "one side too long": ({"sar": sparse(97)}, {}, 413, "too_large"),
    "many bands": ({"sar": sparse(16, 60)}, {}, 422, "layer"),
    "one band": ({"sar": geotiff("dem")}, {}, 422, "layer"),
    "complex": ({"sar": sparse(32, 2, "complex64")}, {}, 422, "layer"),
    "float classes": ({"map": sparse(32, 1)}, {}, 422, "layer"),
    "unit": ({"sar": sparse(24)}, {}, 422, "layer"),
    "lies nowhere": ({"rgb": geotiff("rgb"), "sar": sparse(24)}, {}, 422, "georeference"),
    "small": ({"sar": geotiff("sar", GRID.window(0, 0, 15, 40))}, {}, 422, "georeference"),
    "all observed": ({n: geotiff(n) for n in NAMES}, {}, 422, "request"),
    "unknown modality as file": ({"nir": geotiff("nir")}, {}, 422, "unknown_modality"),
    "unknown target": ({"sar": SAR}, {"target": "lidar"}, 422, "unknown_modality"),
    "observed target": ({"sar": SAR}, {"target": "sar"}, 422, "request"),
    "target twice": ({"sar": SAR}, {"target": ["map", "map"]}, 422, "request"),
    "unknown field": ({"sar": SAR}, {"sample": 1}, 422, "request"),
    "field twice": ({"sar": SAR}, {"seed": [1, 2]}, 422, "request"),
    "modality as text": ({}, {"sar": "s1.tif"}, 422, "request"),
    "field as file": ({"seed": b"1"}, {}, 422, "request"),
    "words for numbers": ({"sar": SAR}, {"seed": "seven"}, 422, "request"),
    "fraction": ({"sar": SAR}, {"samples": "1.5"}, 422, "request"),
    "too many samples": ({"sar": SAR}, {"samples": 17}, 422, "request"),
    "negative seed": ({"sar": SAR}, {"seed": -1}, 422, "request"),
    "nothing at all": ({}, {}, 422, "request"),
    "half a size": ({}, {"width": 32}, 422, "request"),
    "size beside a layer": ({"sar": SAR}, {"width": 32, "height": 32}, 422, "request"),
    "tiny": ({}, {"width": 15, "height": 32}, 422, "georeference"),
    "no size": ({}, {"width": 0, "height": 32}, 422, "georeference"),
    "vast": ({}, {"width": 97, "height": 32}, 413, "too_large"),
    "crs alone": ({}, {**SIDES, "crs": "EPSG:32633"}, 422, "request"),
    "crs is a file": (
        {}, {**SIDES, "crs": "/etc/passwd", "transform": "1,0,0,0,1,0"}, 422, "request",
    ),
    "crs is unknown": (
        {}, {**SIDES, "crs": "EPSG:1", "transform": "1,0,0,0,1,0"}, 422, "georeference",
    ),
    "transform is flat": (
        {}, {**SIDES, "crs": "EPSG:32633", "transform": "0,0,0,0,0,0"}, 422, "georeference",
    ),
    "transform is short": (
        {}, {**SIDES, "crs": "EPSG:32633", "transform": "1,2,3"}, 422, "request",
    ),
    "a day in words": ({"sar": SAR}, {"date": "15 January"}, 422, "request"),
    "no such day": ({"sar": SAR}, {"date": "2023-02-29"}, 422, "request"),
    "beyond the pole": ({"sar": SAR}, {"latitude_deg": 95}, 422, "request"),
    "half a sun": ({"sar": SAR}, {"sun_elevation_deg": 40}, 422, "request"),
    "no pixel size": ({"sar": SAR}, {"gsd_m": "nan"}, 422, "request"),
    "no overlap": (
        {"sar": SAR, "dem": geotiff("dem", Grid("EPSG:32733", GRID.transform, 24, 40))},
        {}, 422, "georeference",
    ),
}  # fmt: skip


# What only the pixels tell.
IN_PIXELS = {"truncated pixels", "unit"}


@pytest.mark.parametrize(
    ("name", "bands", "remedy"),
    [("sar", 1, "leave it out"), ("rgb", 2, "leave it out"), ("sar", 5, "gdal_translate -b")],
)
def test_nobody_is_told_to_select_bands_that_are_not_there(source, name, bands, remedy):
    problem = refused(generate(source, {name: sparse(24, bands)}), 422, "layer")
    assert (problem.got, remedy in problem.remedy) == (str(bands), True)
    assert ("select" in problem.remedy) == (bands > len(MODALITIES[name].bands))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_a_problem_that_says_what_to_do(source, case):
    files, fields, status, code = BAD[case]
    problem = refused(generate(source, files, **fields), status, code)
    assert problem.remedy or problem.allowed
    assert isinstance(error_of(problem), errors.RequestError)


@pytest.mark.parametrize("case", [c for c in BAD if c not in IN_PIXELS])
def test_what_form_and_headers_tell_is_decided_before_pixels_are_decoded(source, case, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(raster, "read_raster", decode)
    files, fields, status, code = BAD[case]
    # A good layer comes first: it must wait for the headers of those that follow.
    refused(generate(source, files, **fields), status, code)


def test_linear_power_is_told_from_decibel(source):
    power = raster.write_geotiff(
        None,
        10 ** (make_layer("sar").values / 10),
        make_layer("sar").valid,
        GRID,
        MODALITIES["sar"],
    )
    problem = refused(generate(source, {"sar": power}), 422, "layer")
    assert "10*log10" in problem.remedy
    assert "sar, band VV" in problem.detail


def test_a_block_larger_than_the_image_is_refused():
    upload = sparse(16, tiled=True, blockxsize=65_536, blockysize=65_536)
    source = make_source(max_side_px=96)
    refused(generate(source, {"sar": upload}), 413, "too_large")


@pytest.mark.parametrize("body", [b"", b"--x\r\nnonsense", b"{}"])
@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=x", "multipart/form-data", "image/tiff", ""]
)
def test_a_body_that_is_no_form_is_refused(source, body, kind):
    request = ("POST", "/v1/generate", {"content": body, "headers": {"content-type": kind}})
    (response,) = ask(build_app(source, serve_config()), request)
    assert response.status_code in (400, 415, 422)
    assert response.headers["content-type"] == "application/problem+json"


def drive(app, chunks, headers=()):
    """Status of a POST whose chunks come one by one, and how many of them were taken."""
    taken, sent = 0, []
    boundary = [(b"content-type", b"multipart/form-data; boundary=x")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/v1/generate", "raw_path": b"/v1/generate", "query_string": b"",
        "root_path": "", "headers": [*boundary, *headers], "server": ("test", 80),
        "client": ("test", 1),
    }  # fmt: skip

    async def receive():
        nonlocal taken
        body = next(chunks, None)
        taken += body is not None
        return {"type": "http.request", "body": body or b"", "more_body": body is not None}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], taken


@pytest.mark.parametrize("charset", ["undefined", "punycode", "raw_unicode_escape", "x\x00"])
def test_a_form_is_utf_8(source, charset):
    """Python decodes a hundred charsets; some fail oddly, and some make lone surrogates."""
    method, path, kwargs = form(date="\\ud800", width=16, height=16)
    content = httpx.Request(method, "http://test", **kwargs)
    kind = content.headers["content-type"]
    for told, status in ((f"{kind}; charset={charset}", 415), (f"{kind}; charset=UTF-8", 422)):
        headers = {"content-type": told.encode()}
        (answer,) = ask(
            build_app(source, serve_config()),
            (method, path, {"content": content.read(), "headers": headers}),
        )
        assert answer.status_code == status, answer.text
        if status == 415:
            assert answer.json()["allowed"] == "utf-8"


def test_the_body_is_limited_before_it_is_read(source):
    app = build_app(source, serve_config(max_side_px=96))
    limit = httpx.Response(200, content=ask(app, ("GET", "/v1/model", {}))[0].content).json()
    limit = limit["limits"]["max_body_bytes"]
    declared = [(b"content-length", str(limit + 1).encode())]
    assert drive(app, iter([b"x"]), declared) == (413, 0)
    # Chunked: no length is declared, so it is counted.
    head = b'--x\r\nContent-Disposition: form-data; name="sar"; filename="a"\r\n\r\n'
    piece = bytes(2**20)
    status, taken = drive(app, iter([head, *[piece] * 100]))
    assert status == 413
    assert taken <= limit // 2**20 + 2


def test_many_tiny_chunks_are_one_form(source):
    body = b'--x\r\nContent-Disposition: form-data; name="width"\r\n\r\n16\r\n--x--\r\n'
    status, _ = drive(build_app(source, serve_config()), iter([bytes([b]) for b in body]))
    assert status == 422  # height is missing, and nothing else


class Gate:
    """Holds a generator's sampling until it is opened."""

    def __init__(self, source, monkeypatch):
        self.opened, self.entered = threading.Event(), threading.Event()
        self.left = threading.Event()
        generator, real = source.served.generator, source.served.generator.sample

        def sample(requests, check=None):
            self.entered.set()
            while not self.opened.wait(0.01):
                try:
                    check()
                except Exception:
                    self.left.set()
                    raise
            return real(requests, check)

        monkeypatch.setattr(generator, "sample", sample)


def test_the_queue_is_bounded_and_says_when_to_try_again(monkeypatch):
    source = make_source()
    gate = Gate(source, monkeypatch)
    app = build_app(source, serve_config(max_queued=2, max_batch=1, batch_wait_ms=0))
    request = form(width=16, height=16, steps=1, target="dem")

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            method, path, keywords = request
            first = [asyncio.create_task(http.request(method, path, **keywords)) for _ in range(2)]
            await asyncio.to_thread(gate.entered.wait, 10)
            third = await http.request(method, path, **keywords)
            alive = await http.get("/healthz")
            gate.opened.set()
            return third, alive, await asyncio.gather(*first)

    third, alive, first = asyncio.run(run())
    refused(third, 429, "overloaded")
    assert third.headers["retry-after"] == "1"
    assert alive.status_code == 200
    assert [r.status_code for r in first] == [200, 200]


def test_the_deadline_holds_and_frees_the_sampler(monkeypatch):
    source = make_source()
    gate = Gate(source, monkeypatch)
    config = serve_config(deadline_s=0.3)
    # A client cannot lift it, whatever it says to Ray Serve.
    headers = {"x-request-timeout-seconds": "-1", "x-request-disconnect-disabled": "?1"}
    response = generate(source, {}, headers, config, width=16, height=16)
    refused(response, 504, "deadline")
    assert gate.left.wait(20)  # within a step, in the thread of batches


def test_without_a_model_it_lives_but_is_not_ready():
    app = build_app(FixedModel(None, registry_error="MLflow is away"), serve_config())
    paths = ("/healthz", "/readyz", "/v1/modalities", "/v1/model", "/metrics", "/docs")
    answers = dict(zip(paths, ask(app, *(("GET", p, {}) for p in paths)), strict=True))
    generate_ = ask(app, form(width=16, height=16))[0]
    assert answers["/healthz"].status_code == 200
    for response in (answers["/readyz"], answers["/v1/modalities"], generate_):
        problem = refused(response, 503, "not_ready")
        assert problem.got == "MLflow is away"
        assert int(response.headers["retry-after"]) > 0
    assert answers["/v1/model"].json()["serving"] is None
    assert "mm_model_ready 0.0" in answers["/metrics"].text


def test_model_and_modalities(source):
    app = build_app(source, serve_config())
    model, modalities = ask(app, ("GET", "/v1/model", {}), ("GET", "/v1/modalities", {}))
    assert model.json()["serving"] == {"name": "mm-test", "version": "3", "run_id": "f00d"}
    assert tuple(model.json()["modalities"]) == NAMES
    known = {m["name"]: m for m in modalities.json()["modalities"]}
    assert tuple(known) == NAMES
    assert known["sar"]["unit"] == "dB"
    assert [c["code"] for c in known["map"]["classes"]] == list(MODALITIES["map"].class_codes)


def test_the_docs_need_no_other_server(source):
    (page,) = ask(build_app(source, serve_config()), ("GET", "/docs", {}))
    assert page.status_code == 200
    assert "/v1/generate" in page.text
    for loads in ("<script", "src=", "http://", "https://", "@import"):
        assert loads not in page.text
    prose, _, schemas = page.text.partition("<h2>Schemas</h2>")
    assert "`" not in prose  # names are set as code
    assert schemas


def test_unknown_paths_and_methods_are_problems(source):
    app = build_app(source, serve_config())
    lost, wrong = ask(app, ("GET", "/nowhere", {}), ("GET", "/v1/generate", {}))
    refused(lost, 404, "request")
    refused(wrong, 405, "request")
    assert wrong.headers["allow"] == "POST"


def test_a_fault_of_ours_tells_no_trace(monkeypatch):
    source = make_source()

    def sample(requests, check=None):
        raise torch.OutOfMemoryError("secret detail")

    monkeypatch.setattr(source.served.generator, "sample", sample)
    response = generate(source, width=16, height=16)
    refused(response, 500, "error")
    assert "secret" not in response.text


@pytest.mark.parametrize("kind", list(error_classes()))
def test_every_error_has_a_status_and_comes_back_as_itself(kind):
    error = kind("what", got=[1], allowed="2", remedy="do")
    back = error_of(Problem.model_validate_json(json.dumps(problem_of(error).model_dump())))
    assert type(back) is kind
    assert (back.what, back.got, back.allowed, back.remedy) == ("what", "[1]", "2", "do")
    assert STATUS[kind] == problem_of(error).status


def test_error_codes_are_unique():
    kinds = list(error_classes())
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert set(kinds) == set(STATUS)


def test_patch_px_is_not_a_divisor_of_the_images():
    assert GRID.width % PATCH_PX  # else these tests would not see a fault at the edges
