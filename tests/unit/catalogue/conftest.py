"""A store with gaps, odd dates, several systems, a place at the antimeridian and one nowhere."""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from catalogue_fixtures import LICENCES, MODALITIES_OF_ODD, ODD_GRIDS
from data_fixtures import place_patches

from mm_model.catalogue.census import take_census
from mm_model.catalogue.write import write_catalogue
from mm_model.data.store import PatchStore, ShardWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline's folder `data` with patches and splits."""
    data = tmp_path_factory.mktemp("pipeline") / "data"
    dates = [None, "2019", "2020-02", "2021-03-04"]
    with ShardWriter(data / "patches", MODALITIES_OF_ODD, shard_patches=3) as writer:
        for place, grid in enumerate(ODD_GRIDS):
            for i, patch in enumerate(place_patches(place, MODALITIES_OF_ODD)):
                layers = {
                    name: replace(layer, acquired_at=dates[(place + k) % 4] if k else None)
                    for k, (name, layer) in enumerate(patch.layers.items())
                }
                here = replace(grid, transform=(*grid.transform[:2], grid.transform[2] + 120 * i,
                                                *grid.transform[3:])) if i else grid  # fmt: skip
                writer.add(replace(patch, layers=layers, grid=here, source=f"source{place % 2}"))
    ids = PatchStore(data / "patches").patch_ids
    splits = [("train", "validation", "test")[i % 3] for i in range(len(ids))]
    frame = pd.DataFrame({"patch_id": ids, "split": splits})
    frame.to_parquet(data / "splits.parquet", index=False)
    return data


@pytest.fixture(scope="module")
def store(folder):
    return PatchStore(folder / "patches")


@pytest.fixture(scope="module")
def census(folder, store):
    splits = pd.read_parquet(folder / "splits.parquet")
    return take_census(store, splits, MODALITIES_OF_ODD)


@pytest.fixture(scope="module")
def catalogue(folder, store):
    out = folder / "catalogue"
    write_catalogue(out, "odd-data", store, folder / "splits.parquet", MODALITIES_OF_ODD, LICENCES)
    return out
