"""Requests that nobody means well with; `python -m benchmarks hostile` sends ten thousand."""

import asyncio
import sys
from pathlib import Path

import httpx
import pytest
from serving_fixtures import GRID, ask, form, geotiff, make_source, refused, serve_config

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.mutations import Mutated, mutated
from mm_model.api import Problem
from mm_model.geo.grid import Grid
from mm_model.serving.app import build_app

COUNT = 400


@pytest.fixture(scope="module")
def app():
    return build_app(make_source(max_side_px=96), serve_config(max_side_px=96, deadline_s=20))


@pytest.fixture(scope="module")
def seeds():
    names = ("sar", "dem", "map")
    return {
        name: [geotiff(name), geotiff(name, Grid("", GRID.transform, 17, 31))] for name in names
    }


def send(app, requests):
    async def run():
        transport = httpx.ASGITransport(app)  # a fault of the application is raised here
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return [
                await http.post(
                    request.path,
                    content=request.body,
                    headers={k: v.encode() for k, v in request.headers.items()},
                )
                for request in requests
            ]

    return asyncio.run(run())


def test_mutated_requests_are_answered_or_refused_with_a_problem(app, seeds):
    requests = list(mutated(seeds, COUNT))
    assert len({request.kind for request in requests}) > 30
    answers = send(app, requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.status_code < 500, (request.kind, answer.text)
        if answer.status_code != 200:
            assert 400 <= Problem.model_validate_json(answer.content).status < 500
    statuses = {answer.status_code for answer in answers}
    assert {200, 400, 413, 415, 422} <= statuses


def test_a_number_makes_the_same_request_again(seeds):
    assert list(mutated(seeds, 20, first=7))[5:] == list(mutated(seeds, 15, first=12))
    assert isinstance(next(mutated(seeds, 1)), Mutated)


@pytest.mark.parametrize(
    "transform",
    [
        (1e-100, 0.0, 1e300, 0.0, -1e-100, 0.0),
        (1e-12, 0.0, 5e5, 0.0, -1e-12, 5e6),
        (10.0, 0.0, 1e308, 0.0, -10.0, 1e308),
    ],
)
def test_a_place_that_cannot_be_counted_is_refused(app, transform):
    where = Grid("EPSG:32633", transform, 24, 40)
    (answer,) = ask(app, form({"sar": geotiff("sar", where)}, target="dem", steps=1))
    assert "affine transform" in refused(answer, 422, "georeference").detail
    fields = {"width": 24, "height": 24, "crs": where.crs, "steps": 1}
    fields["transform"] = ",".join(map(repr, transform))
    (answer,) = ask(app, form(**fields))
    refused(answer, 422, "georeference")


def test_a_pixel_without_a_size_beside_another_layer_is_refused_at_once(app):
    """The finest of such layers is none."""
    nowhere = Grid("EPSG:4326", (1e300, 0.0, 1e300, 0.0, -1e300, 1e300), 24, 40)
    files = {"sar": geotiff("sar", nowhere), "dem": geotiff("dem")}
    (answer,) = ask(app, form(files, target="map", steps=1))
    refused(answer, 422, "georeference")
