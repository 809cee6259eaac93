from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from mm_model.config import SplitConfig
from mm_model.data import split as split_module
from mm_model.data.split import (
    MARGIN,
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    _discs,
    _distance_m,
    load_split,
    make_splits,
)
from mm_model.errors import DataError


def config(**changes):
    return SplitConfig(**{"seed": 0, "train": 0.8, "validation": 0.1, "margin_m": 0, **changes})


def index(places, *, rich=None, spacing_m=100_000.0, patches=2, crs="EPSG:32633", prefix="p"):
    """Rows of places side by side; `rich` of them have three modalities, the others one."""
    rows = []
    for place in range(places):
        known = ("x", "y", "z") if rich is None or place < rich else ("x",)
        for patch in range(patches):
            for modality in known:
                rows.append(
                    {
                        "patch_id": f"{prefix}{place}/{patch}",
                        "place_id": f"{prefix}{place}",
                        "modality": modality,
                        "crs": crs,
                        **dict(
                            zip(
                                "abcdef",
                                (10.0, 0.0, 5e5 + patch * 640, 0.0, -10.0, 1e6 + place * spacing_m),
                                strict=True,
                            )
                        ),
                        "height": 64,
                        "width": 64,
                    }
                )
    return pd.DataFrame(rows)


def by_place(splits):
    return splits.drop_duplicates("place_id").set_index("place_id")["split"].to_dict()


def test_places_stay_whole_and_shares_are_near():
    splits = make_splits(index(400), config())
    assert (splits.groupby("place_id")["split"].nunique() == 1).all()
    share = splits["split"].value_counts(normalize=True)
    # Binomial: 4 standard deviations of 400 draws.
    assert share[TRAIN] == pytest.approx(0.8, abs=0.08)
    assert share[VALIDATION] == pytest.approx(0.1, abs=0.06)


def test_order_of_rows_and_unrelated_places_change_nothing():
    base = by_place(make_splits(index(60), config()))
    shuffled = index(60).sample(frac=1, random_state=3)
    assert by_place(make_splits(shuffled, config())) == base
    more = pd.concat([index(40, prefix="q", crs="EPSG:32733"), index(60)])
    grown = by_place(make_splits(more, config()))
    assert {k: grown[k] for k in base} == base


def test_the_seed_decides():
    assert by_place(make_splits(index(60), config())) != by_place(
        make_splits(index(60), config(seed=1))
    )


@pytest.mark.parametrize("places", [3, 4, 7, 15])
@pytest.mark.parametrize("seed", range(12))
def test_however_few_the_places_no_split_is_empty(places, seed):
    splits = make_splits(index(places), config(seed=seed))
    assert {TRAIN, VALIDATION, TEST} <= set(splits["split"])


@pytest.mark.parametrize("seed", range(12))
def test_testing_gets_a_rich_place_and_training_keeps_one(seed):
    splits = by_place(make_splits(index(15, rich=2), config(seed=seed)))
    rich = [splits["p0"], splits["p1"]]
    assert TEST in rich
    assert set(rich) != {TEST} or TRAIN in splits.values()


def test_too_few_places_is_an_error():
    with pytest.raises(DataError, match="three or more"):
        make_splits(index(2), config())


def with_coarser(table):
    """And a patch a place of twice the pixel, from the same corner."""
    coarse = table[table["patch_id"].str.endswith("/0")].copy()
    coarse["patch_id"] += "@20m"
    coarse[["a", "e"]] *= 2
    return pd.concat([table, coarse], ignore_index=True)


@pytest.mark.parametrize("also", [lambda table: table, with_coarser])
def test_no_training_patch_lies_within_the_margin(also):
    table = also(index(40, spacing_m=1500.0, patches=3))
    margin_m = 1500.0
    splits = make_splits(table, config(margin_m=margin_m))
    assert set(splits["split"]) == set(SPLITS)
    patches = table.drop_duplicates("patch_id").reset_index(drop=True)
    half = patches["a"].to_numpy() * 32
    x = patches["c"].to_numpy() + half
    y = patches["f"].to_numpy() - half
    held_out = splits["split"].isin([TEST, VALIDATION]).to_numpy()
    train = (splits["split"] == TRAIN).to_numpy()
    sides = half[train, None] + half[None, held_out]
    gap_x = np.maximum(np.abs(x[train, None] - x[None, held_out]) - sides, 0)
    gap_y = np.maximum(np.abs(y[train, None] - y[None, held_out]) - sides, 0)
    # Distances on the ellipsoid differ from those of the map by less than 0.5 %.
    assert np.hypot(gap_x, gap_y).min() > margin_m * 0.995
    far = splits["split"] == MARGIN
    assert 0 < far.sum() < len(splits) / 2


def test_a_place_stays_whole_at_all_its_distances():
    table = with_coarser(index(60))
    assert by_place(make_splits(table, config())) == by_place(make_splits(index(60), config()))
    assert (make_splits(table, config()).groupby("place_id")["split"].nunique() == 1).all()


def test_a_margin_over_everything_is_an_error():
    with pytest.raises(DataError, match="margin_m"):
        make_splits(index(10, spacing_m=1000.0), config(margin_m=1e6))


def test_the_margin_reaches_across_reference_systems():
    one = index(20, spacing_m=10_000, prefix="a")
    # The same ground in the neighbouring zone: x of zone 33's meridian 15°E seen from 32.
    from mm_model.data.georeference import transform_xy

    other = index(20, spacing_m=10_000, prefix="b")
    xs, ys = transform_xy("EPSG:32633", "EPSG:32632", list(other["c"]), list(other["f"]))
    other["c"], other["f"], other["crs"] = xs, ys, "EPSG:32632"
    splits = make_splits(pd.concat([one, other]), config(margin_m=2000))
    found = splits.set_index("patch_id")["split"].to_dict()
    held_out = {p for p, s in found.items() if s in (TEST, VALIDATION)}
    twins = {("b" if p[0] == "a" else "a") + p[1:] for p in held_out}
    assert not any(found[p] == TRAIN for p in twins)
    assert any(found[p] == MARGIN for p in twins)


def test_distances_are_those_of_the_sphere():
    # A quarter of the equator; and a degree of longitude at 60° is half of one at 0°.
    quarter = _distance_m(np.array([[0.0, 0.0]]), np.array([[90.0, 0.0]]))
    assert quarter[0] == pytest.approx(10_007_557, rel=1e-6)
    north = _distance_m(np.array([[0.0, 60.0]]), np.array([[1.0, 60.0]]))
    south = _distance_m(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]]))
    assert north[0] / south[0] == pytest.approx(0.5, abs=1e-4)


def test_across_the_date_line():
    assert _distance_m(np.array([[179.9, 0.0]]), np.array([[-179.9, 0.0]]))[0] < 23_000


def test_discs_hold_the_patches():
    patches = index(3).drop_duplicates("patch_id").reset_index(drop=True)
    _, radii = _discs(patches)
    assert radii == pytest.approx(np.hypot(320, 320), rel=0.005)


def test_positions_are_loaded_by_split(tmp_path):
    splits = make_splits(index(30), config())
    path = tmp_path / "splits.parquet"
    splits.to_parquet(path, index=False)
    loaded = load_split(path, list(splits["patch_id"]))
    assert sorted(p for rows in loaded.values() for p in rows) == list(range(len(splits)))
    assert all(a < b for rows in loaded.values() for a, b in pairwise(rows))
    for name, rows in loaded.items():
        assert (splits["split"].iloc[rows] == name).all()
    with pytest.raises(DataError, match="belong"):
        load_split(path, ["another"])
    with pytest.raises(DataError, match="stage split"):
        load_split(tmp_path / "absent.parquet")


@pytest.mark.parametrize("margin_m", [0.0, 1280.0, 300_000.0])
def test_the_margin_is_that_of_comparing_every_pair(margin_m):
    rng = np.random.default_rng(1)
    centres, others = (
        np.stack([rng.uniform(-180, 180, n), rng.uniform(-89, 89, n)], axis=1) for n in (180, 130)
    )
    others[:60] = centres[:60] + rng.normal(0, 0.01, (60, 2))
    radii, other_radii = rng.uniform(100, 900, len(centres)), rng.uniform(100, 5000, len(others))
    gaps = np.stack([split_module._distance_m(c, others) for c in centres])
    gaps = gaps - radii[:, None] - other_radii
    near = split_module._within(centres, radii, others, other_radii, margin_m)
    np.testing.assert_array_equal(near, gaps.min(axis=1) < margin_m)
    assert 0 < near.sum() < len(near)
