"""Figures that tell a model that listens to its scene from one that does not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import FIVE, make_model

from mm_model.data.patch import Layer, Patch
from mm_model.evaluation.scene_use import scene_use
from mm_model.geo.grid import Grid


def patches(count: int = 6) -> list[Patch]:
    rng = np.random.default_rng(0)
    grid = Grid("EPSG:32632", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), 16, 24)
    made = []
    for i in range(count):
        layers = {}
        for m in FIVE:
            if m.is_categorical:
                values = rng.choice(m.class_codes, (1, 16, 24)).astype(np.uint8)
            else:
                low, high = m.display_range
                level = low + (high - low) * rng.random()
                values = np.full((len(m.bands), 16, 24), level, np.float32)
                values += ((high - low) * 0.05 * rng.random(values.shape)).astype(np.float32)
            layers[m.name] = Layer(values, rng.random((16, 24)) < 0.9)
        made.append(Patch(f"p{i}", f"place{i}", "test", grid, 10.0, layers))
    return made


def test_a_decoder_without_shortcuts_from_the_scene_does_not_care_whose_it_is() -> None:
    deaf = make_model()
    with torch.no_grad():
        for name in ("coarse", "mean_scene", "from_scene"):
            getattr(deaf.decoder, name).weight.zero_()
    found = scene_use(deaf, patches(), steps=2, seed=1)
    assert found["loss_right_scene"] == found["loss_wrong_scene"]
    hearing = scene_use(make_model(), patches(), steps=2, seed=1)
    assert hearing["loss_right_scene"] != hearing["loss_wrong_scene"]


def test_a_decoder_that_reads_the_level_off_the_scene_correlates() -> None:
    """The scene's first channel is made the mean colour, and the decoder made to repeat it."""
    model = make_model()
    reflectance = [s.start for n, s in model.codec.slices.items() if n in ("rgb", "nir")]

    def encode(x: torch.Tensor, mask: torch.Tensor) -> object:
        z = torch.zeros(len(x), model.scene_channels, x.shape[2] // 8, x.shape[3] // 8)
        for k, channel in enumerate(reflectance):
            known = mask[:, model.owner[channel]].float()
            z[:, k] = ((x[:, channel] * known).sum((1, 2)) / known.sum((1, 2)))[:, None, None]
        return type("Encoded", (), {"z": z})

    def decode(x, t, present, wanted, z, conditions):
        raw = torch.zeros_like(x)
        for k, channel in enumerate(reflectance):
            width = 3 if k == 0 else 1
            raw[:, channel : channel + width] = z[:, k, :1, :1][:, None]
        return raw

    model.encode, model.decode = encode, decode
    found = scene_use(model, patches(), steps=2, seed=1)
    assert found["color_correlation"] > 0.95
    assert found["loss_right_scene"] < found["loss_wrong_scene"]


def test_one_patch_tells_nothing_of_others() -> None:
    found = scene_use(make_model(), patches(1), steps=1, seed=0)
    assert np.isnan(found["loss_wrong_scene"])
    assert np.isnan(found["color_correlation"])
