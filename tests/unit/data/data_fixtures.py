"""Small stores and rasters for the tests of data, drawn from the declared modalities."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mm_model.data.patch import Layer, Patch, Unit
from mm_model.data.store import PatchStore, ShardWriter
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Modality

CONTINUOUS = [m for m in MODALITIES.values() if not m.is_categorical]
CATEGORICAL = next(m for m in MODALITIES.values() if m.is_categorical)
PAIR = (CONTINUOUS[0], CATEGORICAL)
SHAPE = (8, 12)


def random_layer(
    modality: Modality, rng: np.random.Generator, shape=SHAPE, *, complete=False, date=None
) -> Layer:
    """Values over all of the valid range, and a mask with holes unless complete."""
    size = (len(modality.bands), *shape)
    if modality.is_categorical:
        values = rng.choice(np.array(modality.class_codes, np.uint8), size)
    else:
        values = rng.uniform(*modality.valid_range, size).astype(np.float32)
    valid = np.ones(shape, bool) if complete else rng.random(shape) > 0.3
    return Layer(values, valid, date, modality.gsd_m)


def place_patches(
    place: int,
    modalities: Sequence[Modality],
    *,
    patches: int = 3,
    spacing_m: float = 100_000,
    shape=SHAPE,
) -> Iterator[Patch]:
    """A row of adjacent patches; all but the first modality are missing now and then."""
    rng = np.random.default_rng(place)
    for i in range(patches):
        left = 500_000 + i * shape[1] * 10
        top = 1_000_000 + place * spacing_m
        layers = {
            m.name: random_layer(m, rng, shape, complete=(place + i) % 2 == 0, date="2020-06-01")
            for k, m in enumerate(modalities)
            if k == 0 or (place + i) % (k + 1)
        }
        grid = Grid("EPSG:32633", (10.0, 0.0, float(left), 0.0, -10.0, float(top)), *shape)
        yield Patch(f"p{place:03d}/{i}", f"place{place:03d}", "test", grid, 10.0, layers)


class PlacesSource:
    """A source of made-up places: a unit each."""

    def __init__(self, places: int, modalities: Sequence[Modality], **options) -> None:
        self.places, self.modalities, self.options = places, modalities, options
        self.read_units: list[str] = []

    def units(self) -> list[Unit]:
        return [Unit(f"place{i:03d}", f"version 1 of {i}") for i in range(self.places)]

    def read(self, unit: Unit) -> Iterator[Patch]:
        self.read_units.append(unit.unit_id)
        return place_patches(
            int(unit.unit_id.removeprefix("place")), self.modalities, **self.options
        )


def make_store(path: Path, places: int, modalities=PAIR, shard_patches=4, **options) -> PatchStore:
    with ShardWriter(path, modalities, shard_patches) as writer:
        for place in range(places):
            for patch in place_patches(place, modalities, **options):
                writer.add(patch)
    return PatchStore(path)
