"""One ground at several sampling distances: ids, and what the stages after it make of it."""

import numpy as np
import pytest
import yaml
from data_fixtures import PAIR, PlacesSource
from geotiff_fixtures import FOUR, manifest, write_rasters

from mm_model.config import PrepareConfig, SplitConfig, ValidateConfig
from mm_model.data.prepare import open_source, prepare
from mm_model.data.sources.pyramid import Pyramid
from mm_model.data.split import SPLITS, make_splits
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore
from mm_model.data.validate import validate
from mm_model.errors import ConfigError
from mm_model.modalities import MODALITIES, select

CHOSEN = select(["sar", "dem", "map"])
PATCH_PX = 16
KEEP = {"action": "keep", "max_shift_px": 1.5}


def synthetic(gsd_m, modalities=CHOSEN, **changes):
    earth = {"seed": 7, "places": 9, "patches_per_place": 16, "complete_share": 0.5, **changes}
    return open_source(
        PrepareConfig(
            source="synthetic",
            patch_px=PATCH_PX,
            gsd_m=gsd_m,
            min_valid_fraction=0.2,
            shard_patches=50,
            alignment=KEEP,
            synthetic=earth,
        ),
        modalities,
    )


def by_unit(source):
    return {unit.unit_id: list(source.read(unit)) for unit in source.units()}


def test_one_distance_changes_no_id():
    plain = PlacesSource(4, PAIR)
    alone = Pyramid({10.0: plain})
    assert list(alone.units()) == plain.units()
    ids = [p.patch_id for unit in plain.units() for p in plain.read(unit)]
    assert [p.patch_id for patches in by_unit(alone).values() for p in patches] == ids


def test_a_coarser_distance_adds_ids_and_changes_none():
    one, two, three = (by_unit(synthetic(g)) for g in ((10,), (10, 20), (10, 20, 40)))
    for fewer, more in ((one, two), (two, three)):
        assert list(more) == sorted(more)
        assert set(fewer) < set(more)
        for key, patches in fewer.items():
            assert [p.patch_id for p in more[key]] == [p.patch_id for p in patches]
    ids = [p.patch_id for patches in three.values() for p in patches]
    assert len(set(ids)) == len(ids) == 9 * (16 + 4 + 1)
    assert "synthetic-00003-01-00@20m" in ids
    assert {p.place_id for patches in three.values() for p in patches} == set(one)


def outer(patches):
    bounds = np.array([p.grid.bounds for p in patches])
    return (*bounds[:, :2].min(0), *bounds[:, 2:].max(0))


def mosaic(patches, name):
    side = round(len(patches) ** 0.5)
    values = [p.layers[name].values[0] for p in patches]
    return np.block([values[i : i + side] for i in range(0, len(values), side)])


def test_a_place_is_the_same_ground_on_the_same_day_at_every_distance():
    units = by_unit(synthetic((10, 20), modalities=tuple(MODALITIES.values())))
    agree = []
    for key, fine in units.items():
        if "@" in key:
            continue
        coarse = units[f"{key}@20m"]
        assert {p.gsd_m for p in coarse} == {20}
        assert outer(coarse) == outer(fine)
        assert [(n, y.acquired_at) for n, y in coarse[0].layers.items()] == [
            (n, y.acquired_at) for n, y in fine[0].layers.items()
        ]
        if "dem" in coarse[0].layers:
            small, large = mosaic(coarse, "dem"), mosaic(fine, "dem")
            means = large.reshape(len(small), 2, -1, 2).mean((1, 3))
            assert np.abs(small - means).mean() < 0.02 * max(large.std(), 10)
        if "map" in coarse[0].layers:
            small, large = mosaic(coarse, "map"), mosaic(fine, "map")
            agree.append((large[::2, ::2] == small).mean())
    assert len(agree) > 4
    assert np.mean(agree) > 0.8


def test_a_place_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ConfigError, match=r"30 m: a place of 640 m is 1\.33 patches"):
        synthetic((10, 30))
    with pytest.raises(ConfigError, match=r"0\.5 patches"):
        synthetic((10, 80))
    assert len(by_unit(synthetic((10, 30), patches_per_place=9))) == 18  # from the same corner
    fine, coarse, *_ = by_unit(synthetic((10, 30), patches_per_place=9)).values()
    assert outer(fine) == outer(coarse)


def test_a_scene_whose_manifest_fixes_the_distance_is_read_once(tmp_path):
    write_rasters(tmp_path / "rasters")
    content = manifest(tmp_path / "rasters")
    scenes = content["sources"]["made"].pop("scenes")
    content["sources"]["fixed"] = content["sources"]["made"] | {"gsd_m": 5}
    for name, at in (("made", ("s0", "s2")), ("fixed", ("s1", "s3"))):
        content["sources"][name] = content["sources"][name] | {"scenes": {s: scenes[s] for s in at}}
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(content))
    source = open_source(
        PrepareConfig(
            source="geotiff",
            patch_px=PATCH_PX,
            gsd_m=(10, 20),
            min_valid_fraction=0.2,
            shard_patches=50,
            alignment=KEEP,
            geotiff={"manifest": tmp_path / "manifest.yaml"},
        ),
        FOUR,
    )
    made = by_unit(source)
    once = ["fixed/s1", "fixed/s3"]
    assert list(made) == [*once, "made/s0", "made/s0@20m", "made/s2", "made/s2@20m"]
    for key, patches in made.items():
        assert {p.gsd_m for p in patches} == {5 if key in once else 20 if "@" in key else 10}
    assert len(made["made/s0"]) == 2 * 3
    assert len(made["made/s0@20m"]) == 1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("pyramid") / "patches"
    prepare(synthetic((10, 20)), path, CHOSEN, shard_patches=50, min_valid_fraction=0.2)
    return PatchStore(path)


def test_a_store_of_several_distances_is_split_judged_and_measured(store, tmp_path):
    index = store.index
    assert set(index["gsd_m"]) == {10, 20}
    splits = make_splits(index, SplitConfig(seed=1, train=0.6, validation=0.1, margin_m=500))
    assert set(splits["split"]) <= set(SPLITS)
    assert (splits.groupby("place_id")["split"].nunique() == 1).all()
    limits = ValidateConfig(
        max_white_share=0.8, max_saturated_share=0.5, max_days_apart=31, tolerated_share=0.05
    )
    facts = {"patch_px": PATCH_PX, "min_valid_fraction": 0.2, "max_shift_px": 1.5, "limits": limits}
    paths = {"report": tmp_path / "validation.json", "docs": tmp_path / "docs"}
    assert validate(index, splits, CHOSEN, **facts, **paths) > 20
    fine = [i for i in range(len(store)) if store.read(i).gsd_m == 10]
    coarse = [i for i in range(len(store)) if i not in set(fine)]
    whole, *parts = (
        compute_statistics(store, at, CHOSEN) for at in (range(len(store)), fine, coarse)
    )
    assert whole["places"] == parts[0]["places"] == parts[1]["places"] == 9
    for modality in CHOSEN:
        pixels = [s["modalities"][modality.name]["pixels"] for s in (whole, *parts)]
        assert pixels[0] == pixels[1] + pixels[2]
        assert pixels[1] == pytest.approx(4 * pixels[2], rel=0.05)


@pytest.mark.parametrize("gsd_m", [(), (20, 10), (10, 10), (0, 10), 10])
def test_distances_ascend(gsd_m):
    with pytest.raises(ValueError, match="gsd_m"):
        synthetic(gsd_m)
