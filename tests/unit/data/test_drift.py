import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from data_fixtures import CATEGORICAL, CONTINUOUS, place_patches

from mm_model.data.drift import drift, drift_of_new, seen_layers
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.errors import DataError

NUMBER = CONTINUOUS[0]
BOTH = (NUMBER, CATEGORICAL)


def store(path, change=None, first=0):
    with ShardWriter(path, BOTH, 8) as writer:
        for place in range(first, first + 20):
            for patch in place_patches(place, BOTH, shape=(16, 24)):
                name, function = change or (NUMBER.name, lambda values: values)
                layers = dict(patch.layers)
                if name in layers:
                    layers[name] = replace(layers[name], values=function(layers[name].values))
                writer.add(replace(patch, layers=layers))
    return PatchStore(path)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    trained = store(tmp_path_factory.mktemp("drift") / "trained")
    return compute_statistics(trained, range(len(trained)), BOTH)


def test_other_places_of_the_same_kind_have_not_drifted(statistics, tmp_path):
    found = drift(store(tmp_path / "batch", first=500), statistics, BOTH)
    assert [(d.modality, d.what) for d in found] == [
        *((NUMBER.name, band) for band in NUMBER.band_names),
        (CATEGORICAL.name, "classes"),
    ]
    assert not any(d.has_drifted for d in found)
    assert max(d.distance for d in found) < 0.05


def test_the_band_that_drifted_is_named_and_no_other(statistics, tmp_path):
    def darken(values):
        return np.concatenate([values[:-1], values[-1:] * 0.4])

    found = drift(store(tmp_path / "batch", (NUMBER.name, darken)), statistics, BOTH)
    assert [d.what for d in found if d.has_drifted] == [NUMBER.band_names[-1]]
    # Uniform on [0, 2] became uniform on [0, 0.8]: all of it lies below the trained median.
    (one,) = [d for d in found if d.has_drifted]
    assert one.distance == pytest.approx(0.5, abs=0.02)


def test_a_class_that_took_over_is_named(statistics, tmp_path):
    code = CATEGORICAL.classes[3]

    def flood(values):
        return np.full_like(values, code.code)

    found = drift(store(tmp_path / "batch", (CATEGORICAL.name, flood)), statistics, BOTH)
    (one,) = [d for d in found if d.has_drifted]
    assert one.seen == f"{code.name} 100%"
    assert one.distance == pytest.approx(1 - 1 / len(CATEGORICAL.classes), abs=0.03)


def test_a_modality_without_statistics_is_an_error(statistics, tmp_path):
    known = {"modalities": {CATEGORICAL.name: statistics["modalities"][CATEGORICAL.name]}}
    with pytest.raises(DataError, match=NUMBER.name):
        drift(store(tmp_path / "batch"), known, BOTH)


def test_statistics_of_other_bands_are_an_error(statistics, tmp_path):
    bands = statistics["modalities"][NUMBER.name]["bands"]
    other = {"bands": [{**bands[0], "name": "another"}, *bands[1:]]}
    with pytest.raises(DataError, match="other bands"):
        drift(store(tmp_path / "batch"), {"modalities": {NUMBER.name: other}}, [NUMBER])


def test_the_distance_is_that_of_the_sorted_values(statistics, tmp_path):
    batch = store(tmp_path / "batch", (NUMBER.name, lambda values: values**2 / values.max()))
    layers = [batch.read(i).layers[NUMBER.name] for i in range(len(batch))]
    values = np.sort(np.concatenate([y.values[0, y.valid] for y in layers]))
    quantiles = statistics["modalities"][NUMBER.name]["bands"][0]["quantiles"]
    shares = np.searchsorted(values, list(quantiles.values())) / len(values)
    expected = np.abs(shares - [float(q) for q in quantiles]).max()
    assert drift(batch, statistics, [NUMBER])[0].distance == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def data(statistics, tmp_path):
    """A pipeline's data after its stages; in `patches` lies what the next source gives."""
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    before = store(tmp_path / "before")
    pd.DataFrame({"patch_id": before.patch_ids}).to_parquet(tmp_path / "splits.parquet")
    return tmp_path


def dark(values):
    return values * 0.4


def test_nothing_is_new_in_equal_data(data):
    store(data / "patches")
    assert drift_of_new(data, seen_layers(data / "before")) == (0, [], [])


def test_only_what_is_new_is_compared(data):
    with ShardWriter(data / "patches", BOTH, 8) as writer:
        for place in range(25):
            for patch in place_patches(place, BOTH, shape=(16, 24)):
                layer = patch.layers[NUMBER.name]
                if place >= 20:
                    layer = replace(layer, values=dark(layer.values))
                writer.add(replace(patch, layers={**patch.layers, NUMBER.name: layer}))
    new, found, lacking = drift_of_new(data, seen_layers(data / "before"))
    assert (new, lacking) == (15, [])
    assert {d.modality for d in found if d.has_drifted} == {NUMBER.name}
    assert [d.distance for d in found if d.has_drifted] == [pytest.approx(0.5, abs=0.05)] * len(
        NUMBER.bands
    )


def test_a_patch_whose_pixels_changed_is_new(data):
    store(data / "patches", (NUMBER.name, dark))
    new, found, _ = drift_of_new(data, seen_layers(data / "before"))
    assert new == len(pd.read_parquet(data / "splits.parquet"))
    assert any(d.has_drifted for d in found)


def test_what_came_in_before_an_interruption_is_still_new(data):
    store(data / "patches", (NUMBER.name, dark), first=500)
    new, found, _ = drift_of_new(data, seen_layers(data / "patches"))
    assert new == len(PatchStore(data / "patches"))
    assert any(d.has_drifted for d in found)


def test_a_modality_that_was_not_trained_is_named_and_the_others_are_compared(data):
    trained = json.loads((data / "stats.json").read_text())
    del trained["modalities"][CATEGORICAL.name]
    (data / "stats.json").write_text(json.dumps(trained))
    store(data / "patches", first=500)
    _, found, lacking = drift_of_new(data, seen_layers(data / "before"))
    assert lacking == [CATEGORICAL.name]
    assert {d.modality for d in found} == {NUMBER.name}


def test_without_statistics_or_patches_of_before_nothing_is_compared(data):
    (data / "stats.json").unlink()
    store(data / "patches")
    new, found, lacking = drift_of_new(data, seen_layers(data / "nowhere"))
    assert (new, found) == (len(PatchStore(data / "patches")), [])
    assert set(lacking) == {m.name for m in BOTH}
