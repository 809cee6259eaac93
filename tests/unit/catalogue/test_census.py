"""What is counted, against counting it patch by patch."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from catalogue_fixtures import MODALITIES_OF_ODD

from mm_model.catalogue import census as counting
from mm_model.catalogue.census import spread, take_census


def test_patches_sets_and_places_are_those_of_the_store(store, census):
    patches = [store.read(i) for i in range(len(store))]
    assert list(census.patches["patch_id"]) == store.patch_ids
    assert [set(census.names(m)) for m in census.patches["members"]] == [
        set(p.layers) for p in patches
    ]
    sets = Counter(frozenset(p.layers) for p in patches)
    assert {frozenset(census.names(m)): n for m, n, _ in census.sets} == sets
    assert [n for _, n, _ in census.sets] == sorted(sets.values(), reverse=True)
    for row in census.places.itertuples():
        mine = [p for p in patches if p.place_id == row.place_id]
        assert row.patches == len(mine)
        assert set(census.names(row.members)) == set().union(*(p.layers for p in mine))
        assert row.source == mine[0].source


def test_places_lie_in_the_middle_of_their_patches(store, census):
    places = census.places.set_index("place_id")
    for place, mine in census.patches.groupby("place_id"):
        lon, lat = places.loc[place, ["lon", "lat"]]
        if mine["xmin"].isna().all():
            assert np.isnan(lon)
            assert np.isnan(lat)
            continue
        assert mine["ymin"].min() < lat < mine["ymax"].max()
        if mine["xmin"].min() == -180:  # on the antimeridian, not on the other side of the Earth
            assert 180 - abs(lon) < 0.01
        else:
            assert mine["xmin"].min() < lon < mine["xmax"].max()


def test_pixels_are_counted_once_and_by_mask(store, census):
    for modality in MODALITIES_OF_ODD:
        layers = [store.read(i).layers.get(modality.name) for i in range(len(store))]
        known = np.concatenate(
            [y.values[:, y.valid] for y in layers if y is not None], axis=1
        ).astype(np.float64)
        values = census.values[modality.name]
        assert values.layers == sum(y is not None for y in layers)
        assert values.pixels == known.shape[1]
        if modality.is_categorical:
            assert values.classes == {c: int((known == c).sum()) for c in modality.class_codes}
            continue
        for band, pixels in zip(values.bands, known, strict=True):
            assert band.moments.mean == pytest.approx(pixels.mean())
            assert (band.least, band.greatest) == (pixels.min(), pixels.max())
            assert band.histogram.sum() == pixels.size


def test_dates_of_layers(store, census):
    index = store.index
    for name, row in census.layers.iterrows():
        mine = index[index["modality"] == name]
        assert row["layers"] == len(mine)
        assert row["dated"] == mine["acquired_at"].notna().sum()
        assert row["valid_fraction"] == pytest.approx(mine["valid_fraction"].mean())
    assert 0 < census.layers["dated"].sum() < census.layers["layers"].sum()


def test_many_layers_are_sampled_evenly(folder, store, monkeypatch):
    assert list(spread(np.arange(10), 10)) == list(range(10))
    some = spread(np.arange(1003), 17)
    assert len(some) == 17
    assert set(np.diff(some)) == {59}
    monkeypatch.setattr(counting, "MOST_LAYERS", 4)
    splits = pd.read_parquet(folder / "splits.parquet")
    few = take_census(store, splits, MODALITIES_OF_ODD)
    assert {v.layers for v in few.values.values()} == {4}
    assert len(few.patches) == len(store)
