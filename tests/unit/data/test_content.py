import numpy as np
import pytest

from mm_model.data.content import content
from mm_model.data.patch import Layer
from mm_model.data.quality import NEAR_BITS
from mm_model.modalities import MODALITIES, Quantity

OPTICAL = next(
    m for m in MODALITIES.values() if m.quantity is Quantity.REFLECTANCE and len(m.bands) == 3
)
SHAPE = (40, 56)


@pytest.fixture
def ground():
    rng = np.random.default_rng(0)
    coarse = np.kron(rng.uniform(0.02, 0.2, (3, 5, 7)), np.ones((8, 8)))
    return (coarse + rng.normal(0, 0.004, (3, *SHAPE))).clip(0.001).astype(np.float32)


def of(values, valid=None):
    return content(Layer(values, np.ones(SHAPE, bool) if valid is None else valid), OPTICAL)


def test_clouds_are_white_and_bright_and_nothing_else_is(ground):
    cloudy = ground.copy()
    cloudy[:, :10] = 0.7
    assert of(ground)["white_share"] == 0
    assert of(cloudy)["white_share"] == pytest.approx(0.25)
    sand = ground / 5 + np.array([0.65, 0.5, 0.36], np.float32)[:, None, None]
    assert of(sand)["white_share"] == 0


def test_saturated_and_constant_layers_are_told_from_sound_ones(ground):
    assert of(ground)["saturated_share"] < 0.01
    assert of(np.minimum(ground, 0.05))["saturated_share"] > 0.5
    constant = of(np.full_like(ground, 0.1))
    assert constant["saturated_share"] == 1
    assert constant["look"] is None


def test_only_valid_pixels_count(ground):
    valid = np.ones(SHAPE, bool)
    valid[:10] = False
    cloudy = ground.copy()
    cloudy[:, :10] = 0.7
    assert of(cloudy, valid)["white_share"] == 0
    assert of(cloudy, valid)["median"] == np.median(ground[:, 10:])


def test_a_nearly_equal_image_keeps_its_look_and_another_has_another(ground):
    def bits(a, b):
        return (int(of(a)["look"], 16) ^ int(of(b)["look"], 16)).bit_count()

    noise = np.random.default_rng(1).normal(0, 0.0005, ground.shape).astype(np.float32)
    assert bits(ground, ground * 1.1 + noise) <= NEAR_BITS
    assert bits(ground, ground[:, ::-1]) > 20
