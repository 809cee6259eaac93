"""Files that lack a band of their modality: what is estimated, and what is said of it."""

import time

import numpy as np
import pytest
from rasterio.enums import ColorInterp
from serving_fixtures import (
    GRID,
    ask,
    file_of,
    form,
    geotiff,
    make_bundle,
    make_generator,
    make_layer,
    make_source,
    serve_config,
)

from mm_model.api import ModelIdentity, Provenance
from mm_model.bundle import Bundle
from mm_model.data import raster
from mm_model.data.patch import Layer, Patch
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import LayerError, RequestError
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.bands import complete_bands
from mm_model.serving.generator import Generator
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.observed import ObservedFiles
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import write_scene
from mm_model.serving.uploads import read_layers

RADAR, COLOUR = MODALITIES["sar"], MODALITIES["rgb"]
GENERATOR = make_generator(max_side_px=96)


def related(seed: int, count: int = 2000) -> np.ndarray:
    """VV and VH that follow each other, as over land."""
    rng = np.random.default_rng(seed)
    vv = rng.normal(-11, 3, count)
    return np.stack([vv, 0.8 * vv - 8 + rng.normal(0, 1, count)]).clip(-45, 5)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Of patches whose bands are related, in dB and in the root of reflectance."""
    path = tmp_path_factory.mktemp("bands") / "store"
    with ShardWriter(path, (RADAR, COLOUR), shard_patches=4) as writer:
        for i in range(6):
            rng = np.random.default_rng(i)
            valid = rng.random(GRID.shape) < 0.9
            shade = rng.uniform(0.1, 0.6, GRID.shape)
            roots = np.stack([shade, 0.5 * shade + 0.1, 0.9 * shade + 0.02])
            sar = related(i, GRID.height * GRID.width).reshape(2, *GRID.shape)
            layers = {
                "sar": Layer(sar.astype(np.float32), valid),
                "rgb": Layer(np.square(roots).astype(np.float32), valid),
            }
            writer.add(Patch(f"p{i}", f"place{i}", "test", GRID, 10.0, layers))
    store = PatchStore(path)
    return compute_statistics(store, range(len(store)), (RADAR, COLOUR))


def test_statistics_tell_how_bands_go_together(statistics):
    found = np.array(statistics["modalities"]["sar"]["correlation"])
    seen = np.concatenate([related(i, GRID.height * GRID.width) for i in range(6)], axis=1)
    assert found == pytest.approx(np.corrcoef(seen), abs=0.01)
    roots = np.array(statistics["modalities"]["rgb"]["correlation"])
    assert roots == pytest.approx(np.ones((3, 3)), abs=1e-6)


def test_a_band_that_follows_from_the_others_is_found_again(statistics):
    shade = np.linspace(0.1, 0.6, 80).reshape(8, 10)
    true = np.square(np.stack([shade, 0.5 * shade + 0.1, 0.9 * shade + 0.02])).astype(np.float32)
    for missing in (("green",), ("red", "blue"), ("blue",)):
        known = [k for k, name in enumerate(COLOUR.band_names) if name not in missing]
        found = complete_bands(true[known], missing, COLOUR, statistics)
        assert found == pytest.approx(true, abs=2e-4)
        assert np.array_equal(found[known], true[known])  # what is known stays, to the bit


def test_the_estimate_errs_as_little_as_the_noise_lets_it(statistics):
    true = related(99).astype(np.float32)
    found = complete_bands(true[:1], ("VH",), RADAR, statistics)
    error = np.sqrt(np.square(found[1] - true[1]).mean())
    assert error == pytest.approx(1, rel=0.05)  # the noise; VH itself varies by 2.6 dB
    # Far outside of what was seen it stays within what radar can measure.
    extreme = complete_bands(np.full((1, 4), 40.0), ("VH",), RADAR, statistics)
    assert extreme[1].max() <= RADAR.valid_range[1]


@pytest.mark.parametrize("name", ["VV", "VH"])
def test_a_file_of_one_polarisation_is_completed(name):
    layer = make_layer("sar")
    (found,) = read_layers({"sar": [geotiff("sar", bands=(name,))]}, GENERATOR)["sar"]
    at = RADAR.band_names.index(name)
    other = RADAR.band_names[1 - at]
    assert found.estimated == (other,)
    assert np.array_equal(found.valid, layer.valid)
    assert np.array_equal(found.values[at][layer.valid], layer.values[at][layer.valid])
    known = layer.values[[at]][:, layer.valid]
    expected = GENERATOR.completed("sar", known, (other,))
    assert np.array_equal(found.values[:, layer.valid], expected)
    # Equal means and deviations in these statistics, correlation 0.8.
    table = GENERATOR.manifest.statistics["modalities"]["sar"]["bands"][0]
    middle = table["transformed_mean"]
    assert expected[1 - at] == pytest.approx(middle + 0.8 * (known[0] - middle), abs=1e-4)


def test_bands_beside_them_are_left_alone_and_as_many_without_names_go_by_order():
    layer = make_layer("sar")
    angle = np.full((1, *GRID.shape), 38.0)
    content = file_of(
        np.concatenate([angle, layer.values[:1], angle]), layer.valid, ("angle", "VV", "")
    )
    (found,) = read_layers({"sar": [content]}, GENERATOR)["sar"]
    assert found.estimated == ("VH",)
    assert np.array_equal(found.values[0][layer.valid], layer.values[0][layer.valid])
    (whole,) = read_layers({"sar": [file_of(layer.values, layer.valid, ("a", "b"))]}, GENERATOR)[
        "sar"
    ]
    assert whole.estimated == ()
    assert np.array_equal(whole.values[:, layer.valid], layer.values[:, layer.valid])


B, G, R, N = "blue", "green", "red", "nir"


@pytest.mark.parametrize(
    ("name", "held", "called", "estimated"),
    [
        ("rgb", (B, G, R), ("Blue", "Green", "Red"), ()),
        ("rgb", (B, G, R), ("B02", "B03", "B04"), ()),
        ("rgb", (N, B, G, R), ("B08", "B02", "B03", "B04"), ()),
        ("rgb", (N, R, G), ("nir", "red", "green"), (B,)),
        ("rgb", (R, N, B), ("red", "nir", "blue"), (G,)),
        ("rgb", (R, G, B), ("red", "", ""), ()),
        ("rgb", (R, G, B), ("Band 1", "Band 2", "Band 3"), ()),
        ("sar", ("VH", "VV"), ("vh", "vv"), ()),
        ("sar", ("VH", "VV"), ("Sigma0_VH_db", "Sigma0_VV_db"), ()),
        ("sar", ("VH", "HH"), ("VH", "HH"), ("VV",)),
        ("sar", ("VV", "HH"), ("VV", "HH"), ("VH",)),
    ],
)
def test_bands_go_by_what_their_names_mean(name, held, called, estimated):
    layer, modality = make_layer(name), MODALITIES[name]
    own = dict(zip(modality.band_names, layer.values, strict=True))
    strange = np.full(GRID.shape, 0.9 if name == "rgb" else -3.0)
    content = file_of(np.stack([own.get(n, strange) for n in held]), layer.valid, called)
    (found,) = read_layers({name: [content]}, GENERATOR)[name]
    assert found.estimated == estimated
    for k, band in enumerate(modality.band_names):
        if band not in estimated:
            assert np.array_equal(found.values[k][layer.valid], own[band][layer.valid])


@pytest.mark.parametrize(
    ("name", "called"), [("sar", ("HH", "HV")), ("rgb", ("B05", "B06", "B07")), ("dem", ("red",))]
)
def test_bands_of_something_else_are_refused(name, called):
    layer = make_layer(name)
    with pytest.raises(LayerError, match=f"part {name}: bands") as caught:
        read_layers({name: [file_of(layer.values, layer.valid, called)]}, GENERATOR)
    assert caught.value.got == ", ".join(called)
    assert caught.value.allowed == ", ".join(MODALITIES[name].band_names)


def test_bands_without_names_are_the_colours_that_the_file_declares():
    layer, kinds = make_layer("rgb"), [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    content = file_of(layer.values[::-1], layer.valid, ("",) * 3, colors=kinds)
    (found,) = read_layers({"rgb": [content]}, GENERATOR)["rgb"]
    assert np.array_equal(found.values[:, layer.valid], layer.values[:, layer.valid])


@pytest.mark.parametrize("name", ["rgb", "sar", "dem"])
def test_what_is_transparent_is_not_observed(name):
    """As gdalwarp -dstalpha leaves it: 0 where nothing is known, which is a lawful value."""
    layer = make_layer(name)
    opaque = np.where(layer.valid, 255, 0)[None]
    held = np.concatenate([np.where(layer.valid, layer.values, 0), opaque])
    kinds = [ColorInterp.undefined] * (len(held) - 1) + [ColorInterp.alpha]
    for names in ((*MODALITIES[name].band_names, ""), ("",) * len(held)):
        content = file_of(held, True, names, colors=kinds)
        (found,) = read_layers({name: [content]}, GENERATOR)[name]
        assert found.estimated == ()
        assert np.array_equal(found.valid, layer.valid)
        assert np.array_equal(found.values[:, layer.valid], layer.values[:, layer.valid])


def test_a_band_without_a_name_says_nothing():
    with pytest.raises(LayerError, match="bands") as caught:
        read_layers({"sar": [file_of(make_layer("sar").values[:1], True, ("",))]}, GENERATOR)
    assert "name those that are there" in caught.value.remedy


def test_what_is_wrong_with_the_known_band_is_said_of_it():
    power = 10 ** (make_layer("sar").values[1:] / 10)
    with pytest.raises(LayerError, match="band VH: unit") as caught:
        read_layers({"sar": [file_of(power, True, ("VH",))]}, GENERATOR)
    assert "linear power" in caught.value.remedy


def test_statistics_that_do_not_tell_refuse_it():
    bundle = make_bundle()
    statistics = bundle.manifest.statistics
    statistics["modalities"]["sar"].pop("correlation")
    old = Generator(Bundle(bundle.model, bundle.manifest))
    with pytest.raises(LayerError, match="bands") as caught:
        read_layers({"sar": [geotiff("sar", bands=("VV",))]}, old)
    assert "none of VH" in caught.value.got
    assert read_layers({"sar": [geotiff("sar")]}, old)["sar"][0].estimated == ()


def test_answers_say_what_was_estimated():
    app = build_app(make_source(max_side_px=96), serve_config(max_side_px=96))
    answers = ask(
        app,
        form({"sar": geotiff("sar", bands=("VV",))}, target="rgb", steps=1),
        form({"sar": geotiff("sar")}, target="rgb", steps=1),
    )
    assert [a.headers["x-estimated-bands"] for a in answers] == ["sar:VH", ""]
    tags = raster.read_header(answers[0].content).tags
    assert Provenance.from_tags(tags).estimated_bands == ("sar:VH",)
    assert Provenance.from_headers(answers[0].headers).estimated_bands == ("sar:VH",)


def test_a_scene_of_files_is_that_of_the_endpoint(tmp_path):
    path = tmp_path / "vv.tif"
    path.write_bytes(geotiff("sar", bands=("VV",)))
    (layer,) = read_layers({"sar": [path.read_bytes()]}, GENERATOR)["sar"]
    files = ObservedFiles({"sar": path}, GENERATOR)
    values, valid = files.read(0, GRID.height)["sar"]
    assert files.estimated == ("sar:VH",)
    assert np.array_equal(valid, layer.valid)
    assert np.array_equal(values[:, valid], layer.values[:, valid])

    identity = ModelIdentity(name="mm-test", version="3", run_id="")
    request = SceneRequest({"sar": path}, ("dem",), steps=1)
    (written,) = write_scene(GENERATOR, request, identity, tmp_path / "out")
    tags = raster.read_header(written).tags
    assert Provenance.from_tags(tags).estimated_bands == ("sar:VH",)


def test_a_job_takes_them_and_another_layer_is_filled_beside_them(tmp_path):
    source = make_source(max_side_px=96)
    jobs = JobsPlace(tmp_path / "jobs", "", "mm-test")
    app = build_app(source, serve_config(max_side_px=96), jobs=jobs)
    single = geotiff("sar", bands=("VH",))
    (made,) = ask(app, form({"sar": single}, path="/v1/jobs", target="dem", steps=1))
    assert made.status_code == 201, made.text
    where, give_up = f"/v1/jobs/{made.json()['id']}", time.monotonic() + 120
    while (job := ask(app, ("GET", where, {}))[0].json())["state"] not in ("done", "failed"):
        assert time.monotonic() < give_up, job
        time.sleep(0.2)
    (result,) = ask(app, ("GET", f"{where}/result", {}))
    assert result.headers["x-estimated-bands"] == "sar:VV"

    path = tmp_path / "vh.tif"
    path.write_bytes(single)
    request = SceneRequest({"sar": path}, ("dem",), steps=1)
    served = source.served
    (expected,) = write_scene(served.generator, request, served.identity, tmp_path / "out")
    assert result.content == expected.read_bytes()

    files = {"sar": single, "rgb": geotiff("rgb")}
    (filled,) = ask(app, form(files, path="/v1/fill", fill="rgb", steps=1))
    assert filled.status_code == 200, filled.text
    assert filled.headers["x-estimated-bands"] == "sar:VV"


def test_a_layer_that_lacks_a_band_is_not_filled(tmp_path):
    path = tmp_path / "vv.tif"
    path.write_bytes(geotiff("sar", bands=("VV",)))
    identity = ModelIdentity(name="mm-test", version="3", run_id="")
    request = SceneRequest({"sar": path}, fill="sar", steps=1)
    with pytest.raises(RequestError, match="layer sar") as caught:
        write_scene(GENERATOR, request, identity, tmp_path / "out")
    assert "without VH" in caught.value.got
