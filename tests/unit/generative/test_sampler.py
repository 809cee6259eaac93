from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import itertools

from model_fixtures import FIVE, NAMES, make_model, make_scene

from mm_model.conditions import FEATURES
from mm_model.errors import RequestError, UnknownModalityError
from mm_model.generative import precision, sampler
from mm_model.generative.noise import canvas_noise, generator, sample_seeds, scene_noise
from mm_model.generative.sampler import (
    SCENE_STEPS,
    decode_scene,
    sample,
    sample_scene,
    step_count,
)
from mm_model.generative.windows import Windows
from mm_model.modalities import MODALITIES, channel_slices
from mm_model.scene import Scene
from mm_model.training.step import draw, step_loss

MODEL = make_model()
SLICES = channel_slices(FIVE)


PAIRS = [{"modalities": [name, "map"], "patches": 2} for name in ("sar", "nir")]


def observed(names: tuple[str, ...] = ("sar",), **options: int) -> tuple[torch.Tensor, ...]:
    return MODEL.codec.encode(make_scene(**options).only(*names))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(precision: str) -> None:
    x, mask = observed(("sar",), height=20, width=44)
    targets = ["rgb", "map"]
    batch = sample(MODEL, x, mask, targets, [9, 3, 5], 2, precision=precision)
    alone = sample(MODEL, x[1:2], mask[1:2], targets, [3], 2, precision=precision)
    again = sample(MODEL, x[1:2], mask[1:2], targets, [3], 2, precision=precision)
    other = sample(MODEL, x[1:2], mask[1:2], targets, [4], 2, precision=precision)
    assert torch.equal(alone, again)
    assert not torch.allclose(alone, other, atol=1e-3)
    if precision == "fp32":
        assert torch.equal(batch[1:2], alone)
    else:  # bitwise where the CPU has bf16 instructions, to rounding elsewhere
        assert torch.allclose(batch[1:2], alone, atol=0.05)


def test_matrices_that_are_cast_once_make_the_same_samples(monkeypatch) -> None:
    x, mask = observed(("sar",), height=20, width=44)
    monkeypatch.setattr(precision, "native_precision", lambda _: "fp32")
    assert sampler.for_sampling(MODEL) is MODEL
    monkeypatch.setattr(precision, "native_precision", lambda _: "bf16")
    fast = sampler.for_sampling(MODEL)
    of = {n: p.dtype for n, p in fast.named_parameters()}
    assert of["flow.to_scene.weight"] == of["decoder.fine_in.weight"] == torch.bfloat16
    # Multiplied before it is cast.
    assert of["decoder.pixel_networks.inner.weight"] == torch.float32
    assert {p.dtype for p in MODEL.parameters()} == {torch.float32}
    for steps in (1, 2):
        made = [sample(m, x, mask, ["rgb", "map"], [9, 3, 5], steps) for m in (MODEL, fast)]
        assert torch.equal(*made)


def test_requests_of_different_kinds_share_a_batch() -> None:
    x, mask = observed(NAMES)
    shown = torch.zeros(3, 5, 1, 1, dtype=torch.bool)
    shown[0, 2] = shown[1, 0] = shown[1, 3] = True  # the third sees nothing
    mask = mask & shown
    targets = [["rgb", "map"], ["sar"], list(NAMES)]
    made = sample(MODEL, x, mask, targets, [1, 2, 3], 2)
    for i in range(3):
        alone = sample(MODEL, x[i : i + 1], mask[i : i + 1], targets[i], [i + 1], 2)
        assert torch.equal(made[i : i + 1], alone)
        for name, channels in SLICES.items():
            assert (made[i, channels] != 0).any() == (name in targets[i])


def test_what_the_mask_hides_changes_no_sample() -> None:
    x, mask = observed(("sar", "dem"))
    junk = torch.where(MODEL.channelwise(mask), x, float("nan"))
    clean, spoilt = (sample(MODEL, v, mask, ["rgb"], [1, 2, 3], 2) for v in (x, junk))
    assert torch.equal(clean, spoilt)
    holes = mask.clone()
    holes[:, 2, 4:9, 7:20] = False
    assert not torch.equal(sample(MODEL, x, holes, ["rgb"], [1, 2, 3], 2), clean)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 30), (33, 40), (70, 25)])
def test_any_size_samples(height: int, width: int) -> None:
    x, mask = observed(("sar",), batch=1, height=height, width=width)
    made = sample(MODEL, x, mask, ["rgb", "nir"], [7], 1)
    assert made.shape == (1, MODEL.codec.channels, height, width)
    assert torch.isfinite(made).all()


def test_patch_at_once_is_a_single_window() -> None:
    assert len(Windows.cover(32, 32, 32).corners) == 1
    assert len(Windows.cover(24, 16, 32).corners) == 1


@pytest.mark.parametrize("shape", [(40, 32), (104, 56), (64, 200), (96, 96)])
def test_windows_cover_overlap_and_blend_without_seams(shape: tuple[int, int]) -> None:
    windows = Windows.cover(*shape, 32)
    for axis in (0, 1):
        starts = sorted({c[axis] for c in windows.corners})
        assert starts[0] == 0
        assert starts[-1] + min(32, shape[axis]) == shape[axis]
        assert all(b - a <= 24 for a, b in itertools.pairwise(starts))
        assert all(s % 8 == 0 for s in starts)
    canvas = torch.randn(2, 3, *shape, dtype=torch.float64)
    assert torch.allclose(windows.blend(windows.cut(canvas)), canvas, atol=1e-12)
    # Windows that disagree meet smoothly: one step of 1 is spread over the overlap.
    count = len(windows.corners)
    if count == 2 and shape == (40, 32):
        pieces = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)]).double()
        assert windows.blend(pieces).diff(dim=2).abs().max() < 0.15


def test_noise_is_a_function_of_seed_purpose_and_position() -> None:
    small, large = canvas_noise(3, "sar", 2, 40, 70), canvas_noise(3, "sar", 2, 130, 90)
    assert torch.equal(large[:, :40, :70], small)
    assert not torch.equal(canvas_noise(4, "sar", 2, 40, 70), small)
    assert not torch.equal(canvas_noise(3, "rgb", 2, 40, 70), small)
    assert abs(large.mean()) < 0.03
    assert abs(large.std() - 1) < 0.03
    a, b = (torch.rand(3, generator=generator(1, key)) for key in (23, "23"))
    assert not torch.equal(a, b)


def test_windows_of_a_scene_mostly_share_the_mean_of_their_noise() -> None:
    side = 8
    whole = scene_noise(5, 3, 300, 200, (0, 0), side)
    part = scene_noise(5, 3, 40, 50, (130, 70), side)
    assert torch.allclose(part, whole[:, 130:170, 70:120], atol=1e-6)
    assert scene_noise(None, 3, 4, 5, (0, 0), side).eq(0).all()
    assert abs(whole.std() - 1) < 0.02
    # Windows differ by a fraction of what they do in white noise, 1/side; the seed moves them all.
    assert F.avg_pool2d(whole, side).std((1, 2)).max() < 0.8 / side
    means = torch.stack([scene_noise(k, 3, 64, 64, (0, 0), side).mean((1, 2)) for k in range(200)])
    assert abs(means.std() * side - 1) < 0.1


def test_scene_given_equals_scene_sampled_and_steps_matter() -> None:
    x, mask = observed()
    seeds = [1, 2, 3]
    z = sample_scene(MODEL, x, mask, seeds, SCENE_STEPS * 3)
    assert z.shape == (3, 4, 2, 3)
    made = decode_scene(MODEL, x, mask, z, ["rgb"], seeds, 3)
    assert torch.equal(made, sample(MODEL, x, mask, ["rgb"], seeds, 3))
    assert not torch.allclose(decode_scene(MODEL, x, mask, -z, ["rgb"], seeds, 3), made)


def test_what_leads_to_a_target_is_made_the_same_whether_it_is_wanted_or_not() -> None:
    """Radar and near infrared were never seen together; land cover was, with each."""
    sets = [
        {"modalities": ["sar", "map"], "patches": 2},
        {"modalities": ["nir", "map"], "patches": 2},
    ]
    model = make_model(sets=sets)
    x, mask = model.codec.encode(make_scene().only("sar"))
    alone = sample(model, x, mask, ["nir"], [1, 2, 3], 2)
    both = sample(model, x, mask, ["nir", "map"], [1, 2, 3], 2)
    nir, land = model.codec.slices["nir"], model.codec.slices["map"]
    assert torch.equal(alone[:, nir], both[:, nir])
    assert (alone[:, land] == 0).all()
    assert (both[:, land] != 0).any()
    assert step_count(model, mask, ["nir"], 2) == step_count(model, mask, ["nir", "map"], 2)
    z = sample_scene(model, x, mask, [1, 2, 3], SCENE_STEPS * 2)
    seen = decode_scene(model, x, mask, z, ["map"], [1, 2, 3], 2)
    land_seen = model.codec.decode(seen, ["map"])
    valid = {"map": torch.ones_like(land_seen["map"], dtype=torch.bool)}
    shown = model.codec.encode(Scene(land_seen, valid))
    beside = decode_scene(model, *shown, z, ["nir"], [1, 2, 3], 2)
    assert torch.equal(beside[:, nir], alone[:, nir])


def test_samples_of_one_batch_are_led_in_ways_of_their_own() -> None:
    sets = [
        {"modalities": ["sar", "map"], "patches": 2},
        {"modalities": ["nir", "map"], "patches": 2},
    ]
    model = make_model(sets=sets)
    x, mask = model.codec.encode(make_scene().only("sar", "map"))
    mask[0, 4], mask[1, 2] = False, False  # radar alone; land cover alone; both
    wanted = [["nir", "map"], ["nir", "sar"], ["nir"]]
    whole = sample(model, x, mask, wanted, [1, 2, 3], 2)
    for i in range(3):
        one = sample(model, x[i : i + 1], mask[i : i + 1], wanted[i], [i + 1], 2)
        assert torch.equal(one, whole[i : i + 1])


def test_where_nothing_leads_to_a_target_it_comes_from_the_scene_alone() -> None:
    apart = make_model(sets=[{"modalities": ["sar", "dem"], "patches": 2}])
    x, mask = apart.codec.encode(make_scene().only("sar"))
    z = sample_scene(apart, x, mask, [1, 2, 3], 2)
    made = decode_scene(apart, x, mask, z, ["rgb"], [1, 2, 3], 2)
    blind = decode_scene(apart, *apart.codec.empty(3, 16, 24), z, ["rgb"], [1, 2, 3], 2)
    assert torch.equal(made, blind)
    beside = decode_scene(MODEL, x, mask, z, ["rgb"], [1, 2, 3], 2)
    assert not torch.allclose(beside, blind)


def test_wrong_requests_are_refused() -> None:
    x, mask = observed()
    with pytest.raises(RequestError, match="either observed or a target"):
        sample(MODEL, x, mask, ["sar"], [1, 2, 3])
    with pytest.raises(UnknownModalityError, match="pan"):
        sample(MODEL, x, mask, ["pan"], [1, 2, 3])
    with pytest.raises(RequestError, match="seeds"):
        sample(MODEL, x, mask, ["rgb"], [1, 2])
    with pytest.raises(RequestError, match="steps"):
        sample(MODEL, x, mask, ["rgb"], [1, 2, 3], 0)
    with pytest.raises(RequestError, match="targets"):
        sample(MODEL, x, mask, [["rgb"]], [1, 2, 3])
    with pytest.raises(RequestError, match="precision"):
        sample(MODEL, x, mask, ["rgb"], [1, 2, 3], precision="fp8")


def test_a_request_can_be_cancelled_between_steps() -> None:
    x, mask = observed()
    left = iter(range(5))

    def check() -> None:
        if next(left) == 4:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        sample(MODEL, x, mask, ["rgb"], [1, 2, 3], 3, check=check)


def test_a_sixth_modality_needs_no_other_edit() -> None:
    thermal = dataclasses.replace(MODALITIES["tir"], name="heat", title="Night heat")
    six = (*FIVE, thermal)
    model = make_model(six).train()
    x, mask = model.codec.encode(make_scene(six))
    loss = step_loss(model, x, mask, torch.zeros(3, FEATURES), draw(model, 0, 0, range(3), mask))
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert loss.by_modality.shape == (6,)
    x, mask = model.codec.encode(make_scene(six).only("heat"))
    made = model.codec.decode(sample(model, x, mask, NAMES, [1, 2, 3], 1), NAMES)
    assert {n: v.shape[1] for n, v in made.items()} == dict(rgb=3, nir=1, sar=2, dem=1, map=1)


def test_samples_of_one_thing_are_drawn_in_mirrored_pairs() -> None:
    first, mirrored, other = sample_seeds(3, 7, "patch")
    assert sample_seeds(2, 7, "patch") == [first, mirrored]
    assert len({first, other, *sample_seeds(1, 8, "patch"), *sample_seeds(1, 7, "other")}) == 4
    frame = 2, 19, 23, (5, -3)
    image = canvas_noise(first, "sar", *frame)
    assert torch.equal(canvas_noise(mirrored, "sar", *frame), -image)
    assert not torch.equal(canvas_noise(other, "sar", *frame).abs(), image.abs())
    assert torch.equal(scene_noise(mirrored, *frame, 8), -scene_noise(first, *frame, 8))


def test_from_nothing_each_target_sees_those_before_it() -> None:
    seeds = [5, 6]
    x, mask = MODEL.codec.empty(2, 16, 24)
    made = sample(MODEL, x, mask, list(NAMES), seeds, 2)
    z = sample_scene(MODEL, x, mask, seeds, 2 * SCENE_STEPS)
    known = mask
    for name in reversed(NAMES):
        channels = MODEL.codec.slices[name]
        one = decode_scene(MODEL, x, known, z, [name], seeds, 2)
        torch.testing.assert_close(one[:, channels], made[:, channels], rtol=0, atol=1e-5)
        layers = MODEL.codec.decode(made, NAMES[NAMES.index(name) :])
        every = {n: torch.ones_like(v[:, :1], dtype=torch.bool) for n, v in layers.items()}
        x, known = MODEL.codec.encode(Scene(layers, every))
    # Asking for fewer changes nothing in what comes before them.
    fewer = sample(MODEL, *MODEL.codec.empty(2, 16, 24), list(NAMES[-2:]), seeds, 2)
    for name in NAMES[-2:]:
        assert torch.equal(fewer[:, MODEL.codec.slices[name]], made[:, MODEL.codec.slices[name]])
