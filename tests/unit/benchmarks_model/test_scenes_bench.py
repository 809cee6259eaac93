"""What scenes are asked by the bench: here of methods whose answers are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_fixtures import make_regime

from benchmarks.model.scenes import misregistration, retrieval
from mm_model.data.patch import Layer, Patch
from mm_model.geo.grid import Grid

SIDE = 48  # pieces of 32 px, moved by 8


class Looks:
    """Its scene is what it is shown, coarser: of either modality the same, or nothing."""

    def __init__(self, regime, blind=False):
        self.slices, self.blind = regime.codec.slices, blind
        self.dice = torch.Generator().manual_seed(0)

    def scenes(self, x, mask):
        assert mask.flatten(2).any(-1).sum() == len(x)  # one modality alone is shown
        if self.blind:
            return torch.randn(len(x), 1, 4, 4, generator=self.dice)
        shown = x[:, self.slices["rgb"]][:, :1] + x[:, self.slices["sar"]][:, :1]
        return F.avg_pool2d(shown, 4)


@pytest.fixture(scope="module")
def regime(tmp_path_factory):
    return replace(make_regime(tmp_path_factory.mktemp("scenes")), patch_px=SIDE)


def patches(count: int = 24) -> list[Patch]:
    """Radar that follows from colour; both change over a few pixels."""
    made = []
    for i in range(count):
        coarse = np.random.default_rng(i).uniform(0.02, 0.4, (3, SIDE // 4, SIDE // 4))
        rgb = np.kron(coarse, np.ones((1, 4, 4))).astype(np.float32)
        valid = np.ones((SIDE, SIDE), np.bool_)
        layers = {"rgb": Layer(rgb, valid), "sar": Layer(-20 + 30 * rgb[:2], valid)}
        grid = Grid("EPSG:32632", (10.0, 0.0, 5e5 + 1e5 * i, 0.0, -10.0, 5e6), SIDE, SIDE)
        made.append(Patch(f"p{i}", f"place{i}", "test", grid, 10.0, layers))
    return made


def test_a_scene_that_tells_the_place_finds_it_and_where_it_was_moved(regime):
    there = patches()
    assert retrieval(Looks(regime), regime, there) == {
        "rgb_to_sar_top1": 1, "sar_to_rgb_top1": 1, "chance": 1 / len(there),
    }  # fmt: skip
    assert misregistration(Looks(regime), regime, there) == {"found": 1, "chance": 1 / 9}


def test_a_scene_that_tells_nothing_finds_neither(regime):
    blind = misregistration(Looks(regime, blind=True), regime, patches())
    assert blind["found"] < 0.5
