"""Requests to results, without HTTP."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from serving_fixtures import GRID, NAMES, make_bundle, make_layer

from mm_model.conditions import NOTHING, stack_features
from mm_model.data import georeference
from mm_model.data.circumstances import complete
from mm_model.errors import (
    GeoreferenceError,
    LayerError,
    RequestError,
    TooLargeError,
    UnknownModalityError,
)
from mm_model.generative.noise import sample_seeds
from mm_model.generative.sampler import sample
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.scene import Scene
from mm_model.serving.generator import Generator, Request


@pytest.fixture(scope="module")
def bundle():
    return make_bundle()


@pytest.fixture(scope="module")
def generator(bundle):
    return Generator(bundle, max_side_px=96, max_samples=4, max_batch=3)


ODD = replace(GRID, height=27, width=45)  # its pixels fill no vector of the processor


def one(generator, **request):
    (result,) = generator.generate([Request(**{"steps": 2, **request})])
    return result


def same(first, second) -> bool:
    return list(first.values) == list(second.values) and all(
        np.array_equal(first.values[n], second.values[n]) for n in first.values
    )


def test_an_answer_is_what_the_training_path_samples(bundle, generator):
    layer = make_layer("sar")
    result = one(generator, observed={"sar": layer}, samples=2, seed=7)
    scene = Scene(
        {"sar": torch.from_numpy(layer.values)[None].repeat(2, 1, 1, 1)},
        {"sar": torch.from_numpy(layer.valid)[None, None].repeat(2, 1, 1, 1)},
    )
    x, mask = bundle.model.codec.encode(scene)
    targets = ("rgb", "dem", "map")
    known = torch.from_numpy(stack_features([complete(NOTHING, GRID)] * 2))
    seeds, origins = sample_seeds(2, 7), [GRID.position] * 2
    made = sample(bundle.model, x, mask, targets, seeds, 2, origins=origins, conditions=known)
    expected = bundle.model.codec.decode(made, targets)
    assert list(result.values) == list(targets)
    for name in targets:
        np.testing.assert_array_equal(result.values[name], expected[name].numpy())
        assert result.values[name].dtype == MODALITIES[name].dtype
        assert result.values[name].shape == (2, len(MODALITIES[name].bands), *GRID.shape)


def test_grid_and_mask_are_those_of_the_observed_layer(generator):
    layer = make_layer("sar")
    result = one(generator, observed={"sar": layer})
    assert result.grid == GRID
    np.testing.assert_array_equal(result.valid, layer.valid)


def test_no_result_depends_on_others_in_the_batch(bundle):
    generator = Generator(bundle, max_batch=16)  # large images are fewer to a batch
    requests = [
        Request({"sar": make_layer("sar")}, ("map",), seed=1, steps=2),
        Request({"dem": make_layer("dem", seed=4)}, samples=4, seed=2, steps=2),
        Request(grid=GRID, seed=1, steps=2),
        Request({"rgb": make_layer("rgb")}, ("sar",), seed=3, steps=1),
        *(Request({"dem": make_layer("dem", ODD, k)}, ("map",), seed=k, steps=2) for k in range(2)),
        *(Request({"sar": make_layer("sar", ODD, k)}, ("dem",), steps=2) for k in range(3)),
    ]
    together = generator.generate(requests)
    assert all(same(generator.generate([r])[0], t) for r, t in zip(requests, together, strict=True))


def test_places_share_a_batch_only_where_their_windows_coincide(bundle):
    generator = Generator(bundle, max_batch=16)
    grids = [GRID.window(r, c, 40, 31) for r, c in ((0, 0), (5, 90), (36, 0), (54, 18))]
    requests = [
        Request({"sar": make_layer("sar", grid, k)}, ("rgb",), seed=2, steps=2)
        for k, grid in enumerate(grids)
    ]
    together = generator.generate(requests)
    for request, result in zip(requests, together, strict=True):
        (alone,) = generator.generate([request])
        np.testing.assert_array_equal(result.values["rgb"], alone.values["rgb"])


def test_a_draw_depends_on_seed_and_number_alone(generator):
    layers = {"sar": make_layer("sar")}
    two = one(generator, observed=layers, targets=("rgb",), samples=2, seed=5).values["rgb"]
    three = one(generator, observed=layers, targets=("rgb",), samples=3, seed=5).values["rgb"]
    other = one(generator, observed=layers, targets=("rgb",), seed=6).values["rgb"]
    np.testing.assert_array_equal(two, three[:2])
    assert not np.array_equal(two[0], two[1])
    assert not np.array_equal(two[0], other[0])
    seeds = {s for seed in range(40) for s in sample_seeds(16, seed)}
    assert len(seeds) == 40 * 16
    assert {~s for s in seeds} == seeds


def test_order_of_layers_and_what_an_invalid_pixel_holds_change_nothing(generator):
    sar, dem = make_layer("sar"), make_layer("dem")
    spoilt = replace(dem, values=np.where(dem.valid, dem.values, np.nan))
    first = one(generator, observed={"sar": sar, "dem": dem})
    second = one(generator, observed={"dem": spoilt, "sar": sar})
    assert same(first, second)


def test_finest_layer_gives_the_grid_and_coarser_ones_are_warped(generator):
    coarse = Grid("EPSG:4326", (0.001, 0, 11.0, 0, -0.001, 46.0), 30, 50)
    # Somewhere inside of `coarse`, in metres.
    fine = Grid("EPSG:32632", (20.0, 0.0, 656_000.3, 0.0, -20.0, 5_094_000.7), 40, 32)
    observed = {"dem": make_layer("dem", coarse, hole=False), "sar": make_layer("sar", fine)}
    assert one(generator, observed=observed).grid == fine
    prepared = generator.prepare(Request(observed))
    values, valid = prepared.observed["dem"]
    assert values.shape == (1, *fine.shape)
    assert valid.all()


@pytest.mark.parametrize(
    ("other", "meets"),
    [
        (Grid("EPSG:4326", (0.001, 0, 11.0, 0, -0.001, 46.0), 30, 50), True),
        (Grid("EPSG:4326", (0.001, 0, 11.0, 0, -0.001, 45.9), 30, 50), False),
        (Grid("EPSG:4326", (0.001, 0, 11.1, 0, -0.001, 46.0), 30, 50), False),
        (Grid("EPSG:4326", (0.001, 0, 371.0, 0, -0.001, 46.0), 30, 50), True),
        (Grid("EPSG:4326", (3.6, 0, -180.0, 0, -3.6, 90.0), 50, 100), True),
        (Grid("EPSG:3995", (1.2e5, 0, -5.4e6, 0, -1.2e5, 5.4e6), 90, 91), True),
    ],
)
def test_grids_that_lie_elsewhere_are_told_without_pixels(generator, other, meets):
    fine = Grid("EPSG:32632", (20.0, 0.0, 656_000.3, 0.0, -20.0, 5_094_000.7), 40, 32)
    grids = {"dem": other, "sar": fine}
    if meets:
        assert generator.check_grids(grids) == fine
    else:
        with pytest.raises(GeoreferenceError, match="dem does not overlap"):
            generator.check_grids(grids)


def test_layers_on_either_side_of_the_date_line_meet(generator):
    west = Grid("EPSG:32660", (100.0, 0, 826_000.0, 0, -100.0, 1_000_000.0), 90, 90)
    east = Grid("EPSG:4326", (0.01, 0, -180.0, 0, -0.01, 9.05), 20, 20)
    assert georeference.to_lonlat(west.crs, [835_000], [1_000_000])[0, 0] < 0
    assert generator.check_grids({"sar": west, "dem": east}) == west
    far = replace(east, transform=(0.01, 0, -170.0, 0, -0.01, 9.05))
    with pytest.raises(GeoreferenceError, match="dem does not overlap"):
        generator.check_grids({"sar": west, "dem": far})


def test_a_layer_around_the_pole_holds_what_lies_at_the_pole(generator):
    around = Grid("EPSG:3413", (9e3, 0, -4e5, 0, -9e3, 4.05e5), 90, 91)
    at = Grid("EPSG:3995", (100.0, 0, 2e3, 0, -100.0, 2e3), 20, 24)
    assert generator.check_grids({"sar": at, "dem": around}) == at


@pytest.mark.parametrize("shape", [(16, 90), (33, 17)])
def test_any_size(generator, shape):
    grid = replace(GRID, height=shape[0], width=shape[1])
    result = one(generator, observed={"map": make_layer("map", grid)}, targets=("rgb",))
    assert result.values["rgb"].shape == (1, 3, *shape)
    assert np.isfinite(result.values["rgb"]).all()


def test_nothing_observed_makes_a_joint_set(generator):
    result = one(generator, grid=GRID)
    assert tuple(result.values) == NAMES
    assert result.valid.all()
    assert set(np.unique(result.values["map"])) <= set(MODALITIES["map"].class_codes)


FAR = Grid("EPSG:32633", (10.1, 0.0, 900_000.0, 0.0, -9.9, 5_000_000 / 7), 24, 40)


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (Request(), RequestError, "no layer"),
        (Request({"nir": make_layer("nir")}), UnknownModalityError, "rgb, sar, dem, map"),
        (Request({"sar": make_layer("sar")}, ("nir",)), UnknownModalityError, "nir"),
        (Request({"sar": make_layer("sar")}, ("sar",)), RequestError, "leave out sar"),
        (Request({"sar": make_layer("sar")}, ("map", "map")), RequestError, "once"),
        (Request({n: make_layer(n) for n in NAMES}), RequestError, "every modality"),
        (Request({"sar": make_layer("sar")}, grid=replace(GRID, crs="")), RequestError, "width"),
        (Request({"sar": make_layer("sar")}, samples=5), RequestError, "1 to 4"),
        (Request({"sar": make_layer("sar")}, samples=0), RequestError, "1 to 4"),
        (Request({"sar": make_layer("sar")}, seed=-1), RequestError, "seed"),
        (Request({"sar": make_layer("sar")}, seed=2**63), RequestError, "seed"),
        (Request({"sar": make_layer("sar")}, steps=65), RequestError, "1 to 64"),
        (Request(grid=replace(GRID, height=97)), TooLargeError, "96"),
        (Request(grid=replace(GRID, width=15)), GeoreferenceError, "16"),
        (
            Request({"sar": make_layer("sar"), "dem": make_layer("dem", FAR)}),
            GeoreferenceError,
            "overlap",
        ),
        (
            Request({"sar": make_layer("sar"), "dem": make_layer("dem", replace(FAR, crs=""))}),
            GeoreferenceError,
            "dem has no reference system",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_what_to_do(generator, request_, error, says):
    with pytest.raises(error, match=says):
        generator.generate([request_])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("rgb", lambda v: v * 10_000, "digital numbers"),
        ("rgb", lambda v: v * 100, "percent"),
        ("rgb", lambda v: np.round(v * 300).clip(0, 255), "8-bit picture"),
        ("rgb", lambda v: np.where(v == v.max(), 3, v), "as nodata"),
        ("rgb", lambda v: v - 0.2, "negative reflectance"),
        ("sar", lambda v: 10 ** (v / 10), "linear power"),
        ("sar", lambda v: -v * 100, "digital numbers"),
        ("dem", lambda v: np.where(v > 300, -32768, v), "fill value"),
        ("dem", lambda v: np.where(v > 300, np.inf, v), "infinite"),
        ("map", lambda v: np.where(v == 10, 1, v), "class codes"),
    ],
)
def test_a_wrong_unit_is_named(generator, name, change, says):
    layer = make_layer(name)
    wrong = replace(layer, values=change(layer.values))
    with pytest.raises(LayerError, match=says):
        one(generator, observed={name: wrong})


def test_few_pixels_of_linear_power_are_told_as_well(generator):
    layer = make_layer("sar")
    valid = np.zeros_like(layer.valid)
    valid[:8, :8] = True
    wrong = replace(layer, values=10 ** (layer.values / 10), valid=valid)
    with pytest.raises(LayerError, match="linear power"):
        one(generator, observed={"sar": wrong})
    right = replace(layer, valid=valid)
    one(generator, observed={"sar": right})


def test_celsius_is_named():
    generator = Generator(make_bundle(("tir", "map")))
    layer = make_layer("tir")
    with pytest.raises(LayerError, match=r"273\.15"):
        one(generator, observed={"tir": replace(layer, values=layer.values - 273.15)})


def test_bands_and_empty_layers_are_refused(generator):
    layer = make_layer("sar")
    with pytest.raises(LayerError, match="VV, VH"):
        one(generator, observed={"sar": replace(layer, values=layer.values[:1])})
    with pytest.raises(LayerError, match="no valid pixel"):
        one(generator, observed={"sar": replace(layer, valid=np.zeros_like(layer.valid))})


def test_sampling_can_be_given_up_between_steps(generator):
    class LeftError(Exception):
        pass

    def check(_: float) -> None:
        raise LeftError

    with pytest.raises(LeftError):
        generator.sample([generator.prepare(Request(grid=GRID))], check)
