"""Conditions of requests: given, completed by the grid, kept apart in a batch, and recorded."""

import datetime as dt
from dataclasses import replace

import numpy as np
import pytest
import torch
from serving_fixtures import (
    GRID,
    ask,
    form,
    geotiff,
    make_bundle,
    make_layer,
    make_source,
    refused,
    serve_config,
)

from mm_model.api import Manifest, Provenance
from mm_model.conditions import Conditions
from mm_model.data import raster
from mm_model.data.circumstances import complete
from mm_model.generative.noise import sample_seeds
from mm_model.generative.sampler import sample
from mm_model.scene import Scene
from mm_model.serving.app import build_app
from mm_model.serving.generator import Generator, Request

WINTER = Conditions(date=dt.date(2024, 1, 15))
NOWHERE = replace(GRID, crs="")


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture(scope="module")
def generator(bundle):
    return Generator(bundle, max_batch=16)  # large images are fewer to a batch


def drawn(generator, grid=GRID, conditions=None, **request):
    known = {} if conditions is None else {"conditions": conditions}
    layers = {"sar": make_layer("sar", grid)}
    (result,) = generator.generate([Request(layers, ("rgb",), steps=2, **known, **request)])
    return result.values["rgb"]


@pytest.mark.parametrize(
    "known",
    [
        WINTER,
        Conditions(gsd_m=60),
        Conditions(latitude_deg=-70),
        Conditions(sun_elevation_deg=12, sun_azimuth_deg=200),
    ],
)
def test_what_is_known_changes_the_sample(generator, known):
    assert not np.array_equal(drawn(generator, conditions=known), drawn(generator))


def test_a_grid_need_not_be_told_again(generator):
    told = complete(WINTER, GRID)
    assert told.sun_elevation_deg is not None
    assert np.array_equal(drawn(generator, conditions=told), drawn(generator, conditions=WINTER))


def test_a_grid_that_lies_nowhere_tells_nothing(bundle, generator):
    """Where nothing is known, a request gives what it gave before there were conditions."""
    layer = make_layer("sar", NOWHERE)
    scene = Scene(
        {"sar": torch.from_numpy(layer.values)[None]},
        {"sar": torch.from_numpy(layer.valid)[None, None]},
    )
    x, mask = bundle.model.codec.encode(scene)
    made = sample(bundle.model, x, mask, ("rgb",), sample_seeds(1, 0), 2)
    expected = bundle.model.codec.decode(made, ("rgb",))["rgb"].numpy()
    np.testing.assert_array_equal(drawn(generator, NOWHERE), expected)
    assert not np.array_equal(drawn(generator, GRID), expected)


def test_requests_of_a_batch_keep_their_conditions(generator):
    layers = {"sar": make_layer("sar")}
    each = (Conditions(), WINTER, Conditions(gsd_m=2), complete(WINTER, GRID))
    requests = [Request(layers, ("rgb",), steps=2, conditions=c) for c in each]
    together = [r.values["rgb"] for r in generator.generate(requests)]
    for known, values in zip(each, together, strict=True):
        np.testing.assert_array_equal(values, drawn(generator, conditions=known))


# --- over HTTP -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app():
    return build_app(make_source(), serve_config())


def test_fields_are_what_the_library_takes_and_the_answer_records_them(app, generator):
    fields = {"target": "rgb", "steps": 2, "date": "2024-01-15", "gsd_m": "1e1"}
    (response,) = ask(app, form({"sar": geotiff("sar")}, **fields))
    assert response.status_code == 200, response.text
    known = Conditions(gsd_m=10, date=dt.date(2024, 1, 15))
    found = raster.read_raster(response.content)
    expected = drawn(generator, conditions=known)[0]
    np.testing.assert_array_equal(found.values[:, found.valid], expected[:, found.valid])
    provenance = Provenance.from_headers(response.headers)
    assert provenance.conditions == complete(known, GRID)  # the latitude and the sun are in it
    assert provenance.tags().items() <= found.tags.items()
    assert found.tags["MM_CONDITIONS"].startswith("gsd_m=10.0,date=2024-01-15,sun_elevation_deg=")


def test_the_manifest_records_them_and_nothing_where_nothing_is_known():
    provenance = Provenance(
        model="m", model_version="1", run_id="", observed=(), targets=("rgb", "map"), samples=1,
        seed=0, steps=1, conditions=WINTER,
    )  # fmt: skip
    manifest = Manifest(
        provenance=provenance, crs="", transform=NOWHERE.transform, height=24, width=40, files=()
    )
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    bare = provenance.model_copy(update={"conditions": Conditions()})
    assert "MM_CONDITIONS" not in bare.tags()
    assert Provenance.from_headers(bare.headers()) == bare


@pytest.mark.parametrize(
    ("fields", "field", "got", "allowed"),
    [
        ({"date": "15.1.2024"}, "date", "'15.1.2024'", "YYYY-MM-DD"),
        ({"date": "2024-W03-1"}, "date", "'2024-W03-1'", "YYYY-MM-DD"),
        ({"latitude_deg": "95"}, "latitude_deg", "95.0", "-90 to 90"),
        ({"latitude_deg": "inf"}, "latitude_deg", "'inf'", "-90 to 90"),
        ({"gsd_m": "ten"}, "gsd_m", "'ten'", "0.01 to 10000"),
        ({"sun_elevation_deg": 40}, "sun_azimuth_deg", "40.0 and None", "both"),
    ],
)
def test_a_refusal_names_field_value_and_range(app, monkeypatch, fields, field, got, allowed):
    def decode(*_, **__):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(raster, "read_raster", decode)
    (response,) = ask(app, form({"sar": geotiff("sar")}, **fields))
    problem = refused(response, 422, "request")
    assert field in problem.detail
    assert problem.got == got
    assert allowed in problem.allowed
