"""The order of training patches, and their batches."""

import dataclasses
import datetime as dt

import numpy as np
import pytest
import torch
from training_fixtures import HEIGHT, MAP, RGB, SAR, WIDTH, dataset, patch

from mm_model.errors import DataError
from mm_model.training.dataset import batch_order, collate, conditions_of


def test_each_epoch_sees_every_patch_once():
    rows = np.concatenate([batch_order(s, seed=1, count=7, batch=5) for s in range(14)])
    epochs = rows.reshape(10, 7)
    assert (np.sort(epochs) == np.arange(7)).all()
    assert len({tuple(e) for e in epochs}) > 1


def test_order_depends_on_seed_and_step_only():
    again = batch_order(9, seed=1, count=100, batch=16)
    assert (batch_order(9, seed=1, count=100, batch=16) == again).all()
    assert (batch_order(9, seed=2, count=100, batch=16) != again).any()
    assert (batch_order(10, seed=1, count=100, batch=16) != again).any()


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_order(0, seed=0, count=3, batch=6)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_share_the_same_global_batch(world):
    whole = [p.patch_id for p in dataset().share(5)]
    shares = [p.patch_id for r in range(world) for p in dataset().share(5, r, world)]
    assert shares == whole


def test_only_the_given_positions_are_seen():
    seen = {p.patch_id for s in range(9) for p in dataset(positions=[2, 5, 11]).share(s)}
    assert seen == {"p2", "p5", "p11"}


def test_read_ahead_gives_the_same_batches_from_any_start():
    whole = list(dataset().batches(0, 7))
    late = list(dataset().batches(4, 7))
    assert len(whole) == 7
    for (ids, scene, known), (late_ids, late_scene, late_known) in zip(
        whole[4:], late, strict=True
    ):
        assert ids == late_ids
        assert torch.equal(known, late_known)
        assert all(torch.equal(scene.values[n], late_scene.values[n]) for n in scene.values)
    assert list(dataset().batches(3, 3)) == []


def test_collate_keeps_values_and_marks_what_is_absent():
    patches = [patch(0, RGB, SAR), patch(1, SAR), patch(2, SAR), patch(3, RGB, SAR)]
    scene = collate(patches, (RGB, SAR, MAP))
    assert set(scene.values) == {RGB.name, SAR.name}
    assert scene.values[RGB.name].shape == (4, 3, HEIGHT, WIDTH)
    assert scene.valid[RGB.name].shape == (4, 1, HEIGHT, WIDTH)
    assert not scene.valid[RGB.name][1:3].any()
    for i, p in enumerate(patches):
        layer = p.layers[SAR.name]
        assert (scene.values[SAR.name][i].numpy() == layer.values).all()
        assert (scene.valid[SAR.name][i, 0].numpy() == layer.valid).all()


def test_collate_keeps_class_codes_whole():
    scene = collate([patch(1, MAP)], (MAP,))
    assert scene.values[MAP.name].dtype == torch.uint8


def test_frames_of_a_batch_must_agree():
    with pytest.raises(DataError, match="frames"):
        collate([patch(0, RGB), patch(1, RGB, height=HEIGHT + 8)], (RGB,))
    with pytest.raises(DataError, match="frames"):
        collate([], (RGB,))


def test_an_empty_split_and_an_uneven_share_are_errors():
    with pytest.raises(DataError, match="no patch"):
        dataset(positions=[])
    with pytest.raises(DataError, match="multiple of 4"):
        dataset().share(0, 0, 4)


def test_an_unreadable_patch_reaches_the_caller():
    broken = dataset(positions=[99])
    with pytest.raises(IndexError):
        list(broken.batches(0, 2))


@pytest.mark.parametrize(
    ("acquired_at", "day"),
    [
        ("2021-03-04", dt.date(2021, 3, 4)),
        ("2021-03-04T10:31:00Z", dt.date(2021, 3, 4)),
        ("2021-01", dt.date(2021, 1, 15)),
        ("2021", None),
        (None, None),
    ],
)
def test_a_date_may_be_as_coarse_as_archives_give_it(acquired_at, day):
    whole = patch(0, RGB, SAR)
    layers = {n: dataclasses.replace(v, acquired_at=acquired_at) for n, v in whole.layers.items()}
    found = conditions_of(dataclasses.replace(whole, layers=layers))
    assert found.date == day
    assert (found.sun_elevation_deg is None) == (day is None)
    assert found.gsd_m == 10
    assert 45 < found.latitude_deg < 46
