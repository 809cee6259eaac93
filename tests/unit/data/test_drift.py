from dataclasses import replace

import numpy as np
import pytest
from data_fixtures import CATEGORICAL, CONTINUOUS, place_patches

from mm_model.data.drift import drift
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
