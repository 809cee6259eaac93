from __future__ import annotations

import itertools
import math

import pytest
import torch
from model_fixtures import FIVE, HEIGHT, NAMES, WIDTH, make_scene, spoil, statistics

from mm_model.codec import SPREAD, Codec
from mm_model.errors import DataError, LayerError, UnknownModalityError
from mm_model.modalities import LEVEL_PX, channel_slices, select
from mm_model.scene import Scene


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(FIVE, statistics())


def test_shapes_and_zeros_where_invalid(codec: Codec) -> None:
    x, mask = codec.encode(make_scene())
    assert x.shape == (3, 19, HEIGHT, WIDTH)
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
    flat = statistics()
    band = flat["modalities"][NAME]["bands"][0]
    band["relief"] = {**band["relief"], "transformed_std": 0.0}
    with pytest.raises(DataError, match=f"{NAME}.*relief"):
        Codec(FIVE, flat)
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


SPLIT = [m for m in FIVE if m.splits_relief]
NAME = SPLIT[0].name
FRAMES = [(71, 44), (20, 90), (5, 9), (1, 1)]  # larger, mixed, smaller than the box


def terrain(height: int, width: int, batch: int = 2, valid_share: float = 2.0) -> Scene:
    """Slopes of metres a pixel and noise, in float64."""
    source = torch.Generator().manual_seed(height)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    noise = torch.randn(batch, 1, height, width, generator=source, dtype=torch.float64)
    uniform = torch.rand(batch, 1, height, width, generator=source)
    return Scene({NAME: 400 + 3 * rows - 2 * columns + 9 * noise}, {NAME: uniform < valid_share})


def as_float32(scene: Scene) -> Scene:
    return Scene({n: v.float() for n, v in scene.values.items()}, scene.valid)


@pytest.fixture(scope="module")
def split_codec() -> Codec:
    return Codec(SPLIT, statistics(SPLIT))


def test_a_band_is_a_level_and_a_relief(split_codec: Codec) -> None:
    """The definition, pixel by pixel."""
    scene = terrain(39, 50, batch=1, valid_share=0.4)
    values, valid = scene.values[NAME][0, 0], scene.valid[NAME][0, 0]

    def box_mean(image: torch.Tensor) -> torch.Tensor:
        half, out = LEVEL_PX // 2, torch.zeros_like(image)
        for row, column in valid.nonzero().tolist():
            box = (
                slice(max(row - half, 0), row + half + 1),
                slice(max(column - half, 0), column + half + 1),
            )
            out[row, column] = image[box][valid[box]].mean()
        return out

    level = box_mean(values)
    relief = values - box_mean(level)
    x, _ = split_codec.encode(scene)
    assert x.shape[1] == split_codec.channels == 2
    record = statistics(SPLIT)["modalities"][NAME]["bands"][0]
    constants = [(level, record["center"], record), (relief, 0.0, record["relief"])]
    for channel, (metres, center, numbers) in enumerate(constants):
        stabilised = torch.asinh((metres - center) / numbers["scale"])
        expected = SPREAD * (stabilised - numbers["transformed_mean"]) / numbers["transformed_std"]
        assert torch.allclose(x[0, channel][valid], expected[valid], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frame", FRAMES)
def test_level_and_relief_give_the_values_back(split_codec: Codec, frame: tuple[int, int]) -> None:
    scene = terrain(*frame)
    for given, atol in ((scene, 1e-9), (as_float32(scene), 2e-3)):
        x, _ = split_codec.encode(given)
        assert torch.allclose(split_codec.decode(x, [NAME])[NAME], given.values[NAME], atol=atol)


@pytest.mark.parametrize("frame", FRAMES[:3])
@pytest.mark.parametrize("share", [0.7, 0.02])
def test_valid_pixels_come_back_between_gaps(
    split_codec: Codec, frame: tuple[int, int], share: float
) -> None:
    scene = terrain(*frame, valid_share=share)
    valid = scene.valid[NAME]
    valid[:, :, : frame[0] // 2, : frame[1] // 2] = False
    valid[:, :, -1, -1] = True
    for given, atol in ((scene, 1e-9), (as_float32(scene), 2e-3)):
        x, mask = split_codec.encode(spoil_double(given, math.nan))
        assert torch.equal(x, split_codec.encode(spoil_double(given, 1e9))[0])
        decoded = split_codec.decode(x, [NAME], mask)[NAME]
        assert torch.isfinite(decoded).all()
        assert torch.allclose(decoded[valid], given.values[NAME][valid], atol=atol)


def spoil_double(scene: Scene, value: float) -> Scene:
    return Scene({NAME: torch.where(scene.valid[NAME], scene.values[NAME], value)}, scene.valid)


def test_a_layer_without_a_valid_pixel_is_zero(split_codec: Codec) -> None:
    scene = terrain(20, 36, valid_share=-1.0)
    x, mask = split_codec.encode(scene)
    assert (x == 0).all()
    assert torch.isfinite(split_codec.decode(x, [NAME], mask)[NAME]).all()


@pytest.mark.parametrize("share", [2.0, 0.6])
def test_altitude_moves_the_level_alone(split_codec: Codec, share: float) -> None:
    scene = terrain(70, 45, valid_share=share)
    x, _ = split_codec.encode(scene)
    higher, _ = split_codec.encode(Scene({NAME: scene.values[NAME] + 1000}, scene.valid))
    valid = scene.valid[NAME][:, 0]
    assert torch.allclose(higher[:, 1], x[:, 1], atol=1e-9)
    assert (higher[:, 0] - x[:, 0])[valid].min() > 0.1


def test_noise_of_a_generated_level_averages_out(split_codec: Codec) -> None:
    """Noise of the level costs the decoded metres a tenth, at most, of what it costs the level."""
    x, _ = split_codec.encode(terrain(80, 66))
    clean = split_codec.decode(x, [NAME])[NAME]
    noise = 0.1 * torch.randn(x.shape[0], 80, 66, generator=torch.Generator().manual_seed(0))
    noisy = torch.stack([x[:, 0] + noise, x[:, 1]], 1)
    made = split_codec.decode(noisy, [NAME])[NAME] - clean
    center, scale, shift, gain = (b[0] for b in split_codec.buffers())
    levels = [center + scale * torch.sinh(c[:, 0] / gain + shift) for c in (x, noisy)]
    assert made.std() < (levels[1] - levels[0]).std() / 10


def test_a_wild_level_stays_in_its_box_and_range(split_codec: Codec) -> None:
    x, _ = split_codec.encode(terrain(80, 66))
    wild = x.clone()
    wild[:, 0, 3, 4] = 1e6
    clean, made = (split_codec.decode(v, [NAME])[NAME] for v in (x, wild))
    assert (made - clean).abs().max() < SPLIT[0].valid_range[1] / (LEVEL_PX // 2) ** 2
    assert torch.equal(made[..., 3 + LEVEL_PX :, :], clean[..., 3 + LEVEL_PX :, :])


def test_statistics_travel_in_the_state_dict(codec: Codec) -> None:
    blank = Codec(FIVE, None)
    blank.load_state_dict(codec.state_dict(), strict=True)
    scene = make_scene()
    assert torch.equal(blank.encode(scene)[0], codec.encode(scene)[0])
