import json

import numpy as np
import pytest
import torch
from data_fixtures import CATEGORICAL, CONTINUOUS, make_store

from mm_model.codec import SPREAD, Codec
from mm_model.data.patch import Layer, Patch
from mm_model.data.stats import BandSummary, Moments, compute_statistics
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import DataError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Transform
from mm_model.scene import Scene

ALL = tuple(MODALITIES.values())
ASINH = next(m for m in CONTINUOUS if m.transform is Transform.ASINH)
SPLIT = next(m for m in CONTINUOUS if m.splits_relief)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("stats") / "store", 6, ALL)


def pixels(store, positions, modality):
    """All valid pixels [bands, n], in one piece."""
    layers = [store.read(p).layers.get(modality.name) for p in positions]
    return np.concatenate([x.values[:, x.valid] for x in layers if x], axis=1).astype(np.float64)


def test_streaming_equals_two_passes_over_everything(store):
    positions = [p for p in range(len(store)) if p % 5]
    found = compute_statistics(store, positions, ALL)
    assert found["patches"] == len(positions)
    for modality in CONTINUOUS:
        known = pixels(store, positions, modality)
        entry = found["modalities"][modality.name]
        assert entry["pixels"] == known.shape[1]
        resolution = (modality.valid_range[1] - modality.valid_range[0]) / 65536
        for values, band, declared in zip(known, entry["bands"], modality.bands, strict=True):
            assert band["name"] == declared.name
            assert band["mean"] == pytest.approx(values.mean(), rel=1e-11)
            assert band["std"] == pytest.approx(values.std(), rel=1e-11)
            assert (band["min"], band["max"]) == (values.min(), values.max())
            gap = np.diff(np.sort(values)).max()  # between order statistics, conventions differ
            for q, value in band["quantiles"].items():
                assert value == pytest.approx(np.quantile(values, float(q)), abs=gap + resolution)
            assert ("relief" in band) is modality.splits_relief
            if modality.splits_relief:
                continue  # what is transformed is a level
            mapped = modality.transform.forward(values, band["center"], band["scale"], np)
            assert band["transformed_mean"] == pytest.approx(mapped.mean(), rel=1e-9)
            assert band["transformed_std"] == pytest.approx(mapped.std(), rel=1e-9)


def terrain_store(path, values, valid) -> PatchStore:
    """A store of one split modality: a patch for each [H, W] of values and valid."""
    with ShardWriter(path, [SPLIT], 2) as writer:
        for i, (image, known) in enumerate(zip(values, valid, strict=True)):
            transform = (10.0, 0.0, 5e5 + 1e4 * i, 0.0, -10.0, 1e6)
            grid = Grid("EPSG:32633", transform, *image.shape)
            layers = {SPLIT.name: Layer(image[None].astype(np.float32), known)}
            writer.add(Patch(f"p/{i}", "place", "test", grid, 10.0, layers))
    return PatchStore(path)


@pytest.mark.parametrize("share", [2.0, 0.6])
def test_statistics_of_a_split_give_the_codec_its_spread(tmp_path, share):
    """S of numpy is S of torch: the codec's channels are standardised as they were measured."""
    rng = np.random.default_rng(3)
    slopes = 4.0 * np.arange(52)[:, None] - 3.0 * np.arange(41)
    values = np.float32(rng.uniform(0, 900, (5, 1, 1)) + slopes + rng.normal(0, 6, (5, 52, 41)))
    valid = rng.random(values.shape) < share
    store = terrain_store(tmp_path / "s", np.where(valid, values, np.nan), valid)
    found = compute_statistics(store, range(5), [SPLIT])
    mask = torch.from_numpy(valid)[:, None]
    scene = Scene({SPLIT.name: torch.from_numpy(values)[:, None].double()}, {SPLIT.name: mask})
    x, _ = Codec([SPLIT], found).encode(scene)
    for channel in range(2):
        known = x[:, channel][mask[:, 0]]
        assert known.mean().item() == pytest.approx(0, abs=1e-6)
        assert known.std(unbiased=False).item() == pytest.approx(SPREAD, rel=1e-6)


def test_relief_of_known_terrain(tmp_path):
    """A checkerboard has the level of its middle and a relief of its half step."""
    board = np.indices((48, 40)).sum(0) % 2 * 2.0 - 1.0
    everywhere = np.ones((2, *board.shape), bool)
    steep = terrain_store(tmp_path / "a", [200 + 12 * board, 1400 + 12 * board], everywhere)
    (band,) = compute_statistics(steep, range(2), [SPLIT])["modalities"][SPLIT.name]["bands"]
    assert band["center"] == pytest.approx(band["quantiles"]["0.5"])
    assert band["relief"]["scale"] == pytest.approx(12, abs=0.3)
    assert band["relief"]["transformed_mean"] == pytest.approx(0, abs=0.01)
    assert band["relief"]["transformed_std"] == pytest.approx(np.arcsinh(1), abs=0.03)
    flat = terrain_store(tmp_path / "b", [200 + 0.1 * board, 1400 + 0.1 * board], everywhere)
    (band,) = compute_statistics(flat, range(2), [SPLIT])["modalities"][SPLIT.name]["bands"]
    assert band["relief"]["scale"] == 1.0
    assert band["relief"]["transformed_std"] == pytest.approx(np.arcsinh(0.1), rel=0.03)


def test_classes_are_counted(store):
    positions = range(len(store))
    entry = compute_statistics(store, list(positions), ALL)["modalities"][CATEGORICAL.name]
    known = pixels(store, positions, CATEGORICAL)
    assert set(entry["classes"]) == {str(c) for c in CATEGORICAL.class_codes}
    assert entry["classes"] == {str(c): int((known == c).sum()) for c in CATEGORICAL.class_codes}
    assert entry["pixels"] == known.shape[1]


def test_other_patches_and_order_change_nothing(store):
    positions = [0, 4, 7, 9]
    found = compute_statistics(store, positions, CONTINUOUS[:1])
    backwards = compute_statistics(store, positions[::-1], CONTINUOUS[:1])
    for a, b in zip(
        found["modalities"][CONTINUOUS[0].name]["bands"],
        backwards["modalities"][CONTINUOUS[0].name]["bands"],
        strict=True,
    ):
        assert a["mean"] == pytest.approx(b["mean"], rel=1e-13)
        assert a["quantiles"] == b["quantiles"]


def test_sets_of_modalities_that_occur_together(store):
    found = compute_statistics(store, list(range(len(store))), ALL)["sets"]
    seen = [frozenset(store.read(p).layers) for p in range(len(store))]
    assert {(frozenset(s["modalities"]), s["patches"]) for s in found} == {
        (s, seen.count(s)) for s in set(seen)
    }


def test_merging_is_associative():
    rng = np.random.default_rng(0)
    parts = [BandSummary.of(rng.normal(5, 3, n), (-20.0, 30.0)) for n in (3, 50, 1, 700)]
    left = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    right = parts[0].merge(parts[1].merge(parts[2].merge(parts[3])))
    np.testing.assert_array_equal(left.histogram, right.histogram)
    assert left.moments.mean == pytest.approx(right.moments.mean, rel=1e-13)
    assert left.moments.squares == pytest.approx(right.moments.squares, rel=1e-13)
    empty = Moments()
    assert empty.merge(left.moments) == left.moments
    assert left.moments.merge(empty) == left.moments
    assert empty.merge(empty) == empty


def test_large_offsets_lose_no_precision():
    values = 1e6 + np.random.default_rng(1).random(1000)
    parts = [Moments.of(v) for v in np.split(values, 10)]
    merged = Moments()
    for part in parts:
        merged = merged.merge(part)
    assert merged.std == pytest.approx(values.std(), rel=1e-8)


def test_asinh_scale_never_falls_below_ten_units():
    flat = BandSummary.of(np.full(50, 123.0), ASINH.valid_range)
    from mm_model.data.stats import _transform_constants

    assert _transform_constants(Transform.ASINH, flat) == (pytest.approx(123.0), 10.0)
    steep = BandSummary.of(np.linspace(0, 1000, 10_001), ASINH.valid_range)
    center, scale = _transform_constants(Transform.ASINH, steep)
    assert center == pytest.approx(500, abs=0.3)
    assert scale == pytest.approx(250, abs=0.3)


def test_it_is_json(store):
    found = compute_statistics(store, [0, 1, 2, 3, 4, 5], ALL)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_nothing_to_learn_from_is_an_error(store):
    with pytest.raises(DataError, match="no patches"):
        compute_statistics(store, [], ALL)
    last = ALL[1]
    without = [p for p in range(len(store)) if last.name not in store.read(p).layers]
    with pytest.raises(DataError, match=last.name):
        compute_statistics(store, without, [last])
