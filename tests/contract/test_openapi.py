"""The interface as it is published, and how the application and the client keep to it."""

import asyncio
import datetime as dt
import json
import sys
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mm_model.api import STATUS
from mm_model.client import Client
from mm_model.conditions import Conditions
from mm_model.config import load_params
from mm_model.data import raster
from mm_model.data.circumstances import complete
from mm_model.errors import LayerError, NotReadyError, RequestError, ServiceError
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/unit/serving"))
from serving_fixtures import GRID, geotiff, make_source, serve_config  # noqa: E402

SNAPSHOT = ROOT / "docs/openapi.json"
APP = build_app(make_source(max_side_px=64, max_samples=2), serve_config(max_side_px=64))
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)


def test_the_committed_document_is_the_applications():
    """A change of the interface is a change of docs/openapi.json, which a person reviews.

    `python tests/contract/test_openapi.py` writes it.
    """
    assert json.loads(SNAPSHOT.read_text()) == published()


def published() -> dict:
    config = load_params(ROOT / "params.yaml").serve
    return build_app(FixedModel(None), config).openapi()


def test_each_form_says_which_sides_it_takes():
    serve, paths = load_params(ROOT / "params.yaml").serve, published()["paths"]
    for path, most in (("generate", serve.max_side_px), ("jobs", serve.jobs.max_side_px)):
        body = paths[f"/v1/{path}"]["post"]["requestBody"]["content"]["multipart/form-data"]
        fields = body["schema"]["properties"]
        assert {fields[side]["maximum"] for side in ("width", "height")} == {most}


@SCHEMA.parametrize()
@settings(max_examples=15, suppress_health_check=list(HealthCheck))
def test_the_application_keeps_to_the_document(case):
    case.call_and_validate(
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ]
    )


def test_every_status_of_a_request_is_documented():
    text = (ROOT / "docs/http.md").read_text()
    for kind, status in STATUS.items():
        assert f"`{kind.code}`" in text, kind
        assert str(status) in text


class InProcess(httpx.BaseTransport):
    """The real application behind a synchronous client."""

    def __init__(self, app):
        self._transport = httpx.ASGITransport(app)

    def handle_request(self, request):
        request.read()

        async def run():
            answer = await self._transport.handle_async_request(request)
            return answer.status_code, answer.headers, await answer.aread()

        status, headers, content = asyncio.run(run())
        return httpx.Response(status, headers=headers, content=content)


@pytest.fixture(scope="module")
def client():
    with Client("http://endpoint", transport=InProcess(APP)) as client:
        yield client


def test_the_client_gets_files_from_files(client, tmp_path):
    (tmp_path / "in.tif").write_bytes(geotiff("sar"))
    made = client.generate({"sar": tmp_path / "in.tif"}, ["dem"], seed=2, steps=1)
    assert list(made.files) == ["dem.tif"]
    assert made.manifest is None
    assert (made.provenance.observed, made.provenance.seed) == (("sar",), 2)
    several = client.generate({"sar": geotiff("sar")}, samples=2, steps=1)
    assert [f.name for f in several.manifest.files] == list(several.files)
    assert len(several.save(tmp_path / "out")) == 6
    place = {"crs": GRID.crs, "transform": GRID.transform}
    joint = client.generate({}, steps=1, height=16, width=20, **place)
    assert joint.manifest.transform == GRID.transform
    picture = client.generate({}, steps=1, height=16, width=20, picture=True)
    assert list(picture.files) == ["generated.png"]


def test_the_client_says_what_is_known(client):
    winter = Conditions(date=dt.date(2024, 1, 15))
    made = client.generate({"sar": geotiff("sar")}, ["dem"], steps=2, conditions=winter)
    assert made.provenance.conditions == complete(winter, GRID)
    made = client.embed({"sar": geotiff("sar")}, conditions=winter)
    assert made.vector.conditions == complete(winter, GRID)
    with pytest.raises(RequestError, match="one GeoTIFF or more"):
        client.embed({}, conditions=winter)


def test_the_client_embeds_files(client, tmp_path):
    (tmp_path / "in.tif").write_bytes(geotiff("sar"))
    embedded = client.embed({"sar": tmp_path / "in.tif"})
    assert [p.name for p in embedded.save(tmp_path / "out")] == ["scene.tif", "vector.json"]
    scene = raster.read_raster(tmp_path / "out/scene.tif")
    assert scene.grid == GRID.coarser(8)
    assert len(embedded.vector.vector) == 2 * len(scene.values)


def test_the_client_asks_what_serves(client):
    assert client.ready() == client.wait_ready(1, version=3) == "3"
    assert client.model().serving.name == "mm-test"
    assert [m.name for m in client.modalities()] == ["rgb", "sar", "dem", "map"]
    with pytest.raises(NotReadyError, match="version 4"):
        client.wait_ready(0, version=4)


def test_the_client_raises_the_librarys_errors(client):
    with pytest.raises(LayerError, match="VV, VH"):
        client.generate({"sar": geotiff("dem")})
    empty = build_app(FixedModel(None), serve_config())
    with (
        Client("http://endpoint", transport=InProcess(empty)) as unready,
        pytest.raises(NotReadyError),
    ):
        unready.ready()
    with Client("http://127.0.0.1:1") as nobody, pytest.raises(ServiceError, match="mm up"):
        nobody.ready()


def test_an_answer_of_somebody_else_is_named():
    def other(request):
        return httpx.Response(404 if "ready" in str(request.url) else 200, text="<html>hello")

    with Client("http://endpoint", transport=httpx.MockTransport(other)) as client:
        asked = (lambda: client.generate({}), lambda: client.embed({"sar": b""}))
        for ask in (client.ready, client.model, *asked):
            with pytest.raises(ServiceError, match="not as this endpoint does"):
                ask()


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(published(), indent=1) + "\n")
