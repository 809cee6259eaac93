from __future__ import annotations

import itertools
import math

import pytest
import torch
from model_fixtures import FIVE, HEIGHT, NAMES, WIDTH, make_scene, spoil, statistics

from mm_model.codec import SPREAD, Codec
from mm_model.errors import DataError, LayerError, UnknownModalityError
from mm_model.modalities import channel_slices, select
from mm_model.scene import Scene


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(FIVE, statistics())


def test_shapes_and_zeros_where_invalid(codec: Codec) -> None:
    x, mask = codec.encode(make_scene())
    assert x.shape == (3, 18, HEIGHT, WIDTH)
    assert mask.shape == (3, 5, HEIGHT, WIDTH)
    assert x.dtype is torch.float32
    assert mask.dtype is torch.bool
    for index, channels in enumerate(channel_slices(FIVE).values()):
        assert (x[:, channels][~mask[:, index, None].expand_as(x[:, channels])] == 0).all()


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e9, -5.0])
def test_what_an_invalid_pixel_holds_changes_nothing(codec: Codec, junk: float) -> None:
    scene = make_scene()
    x, mask = codec.encode(spoil(scene, 0.0))
    x_spoilt, mask_spoilt = codec.encode(spoil(scene, junk))
    assert torch.equal(x, x_spoilt)
    assert torch.equal(mask, mask_spoilt)


def test_any_key_order_gives_the_same(codec: Codec) -> None:
    scene = make_scene()
    expected = codec.encode(scene)
    for order in itertools.permutations(NAMES):
        shuffled = Scene({n: scene.values[n] for n in order}, {n: scene.valid[n] for n in order})
        for got, want in zip(codec.encode(shuffled), expected, strict=True):
            assert torch.equal(got, want)


def test_absent_modality_is_masked_and_zero(codec: Codec) -> None:
    x, mask = codec.encode(make_scene().without("sar"))
    assert not mask[:, 2].any()
    assert (x[:, channel_slices(FIVE)["sar"]] == 0).all()


def test_statistics_give_the_spread() -> None:
    sar = select(["sar"])
    values = torch.randn(2, 2, 60, 70) * 4 - 12
    valid = torch.ones(2, 1, 60, 70, dtype=torch.bool)
    x, _ = Codec(sar, statistics(sar)).encode(Scene({"sar": values}, {"sar": valid}))
    assert x.std().item() == pytest.approx(SPREAD, rel=0.03)
    assert x.mean().item() == pytest.approx(0, abs=0.03)


def test_probabilities_invert_one_hot(codec: Codec) -> None:
    scene = make_scene(valid_share=2.0)
    x, _ = codec.encode(scene)
    probabilities = codec.class_probabilities(x, "map")
    assert torch.allclose(probabilities.sum(1), torch.ones(3, HEIGHT, WIDTH))
    assert probabilities.amax(1).min() > 0.999
    assert torch.equal(codec.decode(x, ["map"])["map"].long(), scene.values["map"])
    with pytest.raises(LayerError, match="class probabilities of rgb"):
        codec.class_probabilities(x, "rgb")


def test_decoded_values_stay_in_the_valid_range(codec: Codec) -> None:
    wild = 50 * torch.randn(2, codec.channels, 8, 8)
    for modality in FIVE:
        decoded = codec.decode(wild, [modality.name])[modality.name].float()
        low, high = modality.valid_range
        assert decoded.min() >= low
        assert decoded.max() <= high


@pytest.mark.parametrize("fault", ["absent", "empty"])
def test_a_modality_never_seen_in_training_is_an_error(fault: str) -> None:
    stats = statistics()
    if fault == "absent":
        del stats["modalities"]["nir"]
    else:
        stats["modalities"]["nir"]["pixels"] = 0
    with pytest.raises(DataError, match=r"nir.*no valid pixel in the training split"):
        Codec(FIVE, stats)


def test_unusable_statistics_are_errors() -> None:
    constant = statistics()
    constant["modalities"]["dem"]["bands"][0]["transformed_std"] = 0.0
    with pytest.raises(DataError, match="dem"):
        Codec(FIVE, constant)
    swapped = statistics()
    swapped["modalities"]["sar"]["bands"].reverse()
    with pytest.raises(DataError, match="bands in the statistics of sar"):
        Codec(FIVE, swapped)


def test_bad_scenes_are_refused(codec: Codec) -> None:
    scene = make_scene()
    strange = {**scene.values, "map": scene.values["map"] + 1}
    with pytest.raises(LayerError, match="class codes of map"):
        codec.encode(Scene(strange, scene.valid))
    broken = {**scene.values, "sar": torch.full_like(scene.values["sar"], math.nan)}
    with pytest.raises(LayerError, match="valid pixels of sar"):
        codec.encode(Scene(broken, scene.valid))
    with pytest.raises(LayerError, match="bands of sar"):
        codec.encode(Scene({"sar": scene.values["rgb"]}, {"sar": scene.valid["rgb"]}))
    with pytest.raises(UnknownModalityError, match="tir"):
        codec.encode(Scene({"tir": scene.values["dem"]}, {"tir": scene.valid["dem"]}))


def test_statistics_travel_in_the_state_dict(codec: Codec) -> None:
    blank = Codec(FIVE, None)
    blank.load_state_dict(codec.state_dict(), strict=True)
    scene = make_scene()
    assert torch.equal(blank.encode(scene)[0], codec.encode(scene)[0])
