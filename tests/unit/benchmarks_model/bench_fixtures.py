"""A store of a few small patches whose modalities follow from each other, as a regime."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.model.regimes import Regime
from mm_model.data.patch import Layer, Patch
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.geo.grid import Grid
from mm_model.modalities import select

NAMES = ("rgb", "nir", "sar", "map")
SELECTED = select(NAMES)
HEIGHT, WIDTH = 16, 24
TRAIN, TEST = 36, 6


def patch(i: int, names=NAMES) -> Patch:
    """Near infrared is red; radar and cover are functions of it, too."""
    rng = np.random.default_rng(i)
    rgb = rng.uniform(0.02, 0.4, (3, HEIGHT, WIDTH)).astype(np.float32)
    valid = rng.random((HEIGHT, WIDTH)) < 0.9
    layers = {
        "rgb": Layer(rgb, valid),
        "nir": Layer(rgb[:1].copy(), valid),
        "sar": Layer(-20 + 30 * rgb[:2], valid),
        "map": Layer(np.where(rgb[:1] > 0.2, 10, 80).astype(np.uint8), valid),
    }
    grid = Grid("EPSG:32632", (10.0, 0.0, 5e5 + 1e5 * i, 0.0, -10.0, 5e6), HEIGHT, WIDTH)
    place = f"place{i // 3}"
    return Patch(f"p{i:03d}", place, "test", grid, 10.0, {n: layers[n] for n in names})


def make_store(path: Path, first: int, count: int, names=lambda i: NAMES) -> PatchStore:
    with ShardWriter(path, SELECTED, shard_patches=8) as writer:
        for i in range(first, first + count):
            writer.add(patch(i, names(i)))
    return PatchStore(path)


def make_regime(folder: Path, train: PatchStore | None = None) -> Regime:
    train = train or make_store(folder / "train", 0, TRAIN)
    test = make_store(folder / "test", 100, TEST)
    return Regime(
        "complete",
        SELECTED,
        train,
        tuple(range(len(train))),
        test,
        tuple(range(len(test))),
        test,
        ((), ()),
        compute_statistics(train, range(len(train)), SELECTED),
        HEIGHT,
    )
