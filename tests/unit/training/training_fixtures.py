"""Patches in memory and a model of a few thousand parameters, for the tests of training."""

from pathlib import Path

import numpy as np
import torch

from mm_model.codec import Codec
from mm_model.config import TrainConfig
from mm_model.data.patch import Layer, Patch
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.nn.model import SceneModel, Size
from mm_model.training.dataset import PatchDataset

RGB, SAR, MAP = SELECTED = tuple(MODALITIES[n] for n in ("rgb", "sar", "map"))
HEIGHT, WIDTH = 16, 24
SIZE = Size(8, 8, 16, 1, 1, 1, 2, 4)
SETS = [{"modalities": [m.name for m in SELECTED], "patches": 5}]


def patch(i: int, *modalities, height: int = HEIGHT) -> Patch:
    rng = np.random.default_rng(i)
    layers = {
        m.name: Layer(
            rng.choice(m.class_codes, (1, height, WIDTH)).astype(np.uint8)
            if m.is_categorical
            else rng.random((len(m.bands), height, WIDTH)).astype(np.float32),
            rng.random((height, WIDTH)) < 0.9,
        )
        for m in modalities
    }
    grid = Grid("EPSG:32632", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), height, WIDTH)
    return Patch(f"p{i}", f"place{i // 2}", "test", grid, 10.0, layers)


class ListStore:
    """A store in memory, of patches that lack one modality or another."""

    def __init__(self, count: int) -> None:
        sets = [(RGB, SAR), (SAR, MAP), (RGB, SAR, MAP)]
        self.patches = [patch(i, *sets[i % 3]) for i in range(count)]

    def read_many(self, positions, modalities=None) -> list[Patch]:
        return [self.read(i, modalities) for i in positions]

    def read(self, i, modalities=None) -> Patch:
        return self.patches[i]


def dataset(batch: int = 6, count: int = 23, positions=None, seed: int = 3) -> PatchDataset:
    chosen = range(count) if positions is None else positions
    return PatchDataset(ListStore(count), chosen, SELECTED, seed=seed, batch=batch)


def statistics() -> dict:
    def band(name: str) -> dict:
        about = {"center": 0.0, "scale": 1.0, "transformed_mean": 0.5, "transformed_std": 0.3}
        return {"name": name, **about}

    return {
        "modalities": {
            m.name: {"pixels": 9, "classes": {"10": 9}}
            if m.is_categorical
            else {"pixels": 9, "bands": [band(n) for n in m.band_names]}
            for m in SELECTED
        }
    }


def make_model() -> SceneModel:
    torch.manual_seed(0)
    return SceneModel(SELECTED, SIZE, Codec(SELECTED, statistics()), SETS, patch_px=HEIGHT)


def train_config(**changes) -> TrainConfig:
    config = {
        "start": "scratch",
        "seed": 3,
        "steps": 9,
        "batch": 6,
        "workers": 0,
        "gpus_per_worker": 0,
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "gradient_clip": 1.0,
        "ema": 0.9,
        "precision": "fp32",
        "checkpoint_every": 4,
        "picture_every": 100,
        "max_failures": 0,
    }
    return TrainConfig(**{**config, **changes})


class Notes:
    """A reporter that remembers, and may end the training at a step."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[int] = []
        self.crash_at = crash_at

    def metrics(self, step, values) -> None:
        self.rows.append((step, dict(values)))

    def picture(self, step, save) -> None:
        self.pictures.append(step)
        save(Path(f"{step}.png"))
