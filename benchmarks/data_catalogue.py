"""The catalogue of 100,000 patches of 5 modalities: seconds of each part, and memory.

The patches are those of a few synthetic places, which the index names again and again, each time
elsewhere on the Earth: sizes of index, items and map are real, and so is every pixel that is
decoded, but the pixels come from the page cache and not from the disk.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import setting
from mm_model.catalogue.card import data_card
from mm_model.catalogue.census import take_census
from mm_model.catalogue.charts import save_classes, save_histograms, save_map
from mm_model.catalogue.collection import collection
from mm_model.catalogue.items import write_items
from mm_model.catalogue.sheets import sheets
from mm_model.data.index import INDEX, IndexWriter, table_of
from mm_model.data.store import PatchStore

PATCHES = 100_000
PLACES = 8


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Seconds and MB; each part once."""
    chosen = setting.params()
    figures: dict[str, float] = {}

    def timed(name: str, part: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = part()
        figures[f"{name}_s"] = time.perf_counter() - began
        return result

    with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
        folder = Path(name)
        _many(setting.make_store(chosen, folder / "patches", PLACES))
        out = folder / "catalogue"
        out.mkdir()
        before = _peak_mb()
        store = timed("open_store", lambda: PatchStore(folder / "patches"))
        opened = _peak_mb()
        splits = pd.DataFrame({"patch_id": store.patch_ids, "split": "train"})
        census = timed("census", lambda: take_census(store, splits, chosen.selected))
        record = collection("bench", census, {"synthetic": {"licence": "none"}}, {})
        timed("items", lambda: write_items(out / "items.parquet", store, census, record))
        timed("map", lambda: save_map(out / "map.png", census))
        timed("histograms", lambda: save_histograms(out / "histograms.png", census))
        timed("classes", lambda: save_classes(out / "classes.png", census))
        timed("card", lambda: data_card("bench", census, {}, store.index))
        html = timed("sheets", lambda: sheets(store, census))
        figures |= {
            "patches": len(store),
            "places": len(census.places),
            "layers": len(store.index),
            "items_mb": (out / "items.parquet").stat().st_size / 1e6,
            "sheets_mb": len(html) / 1e6,
            "opening_adds_mb": opened - before,
            "catalogue_adds_mb": _peak_mb() - opened,
        }
    return figures, {"": __doc__ or ""}


def _many(store: PatchStore) -> None:
    """Name the store's patches again in its index, each time moved, up to `PATCHES`."""
    index, rng = store.index, np.random.default_rng(0)
    copies = []
    for i in range(-(-PATCHES // len(store))):
        copy = index.copy()
        copy["patch_id"] = f"{i}/" + copy["patch_id"]
        copy["place_id"] = f"{i}/" + copy["place_id"]
        copy["crs"] = f"EPSG:{32601 + i % 60}"
        copy["f"] += float(rng.uniform(-2e6, 2e6))
        copies.append(copy)
    writer = IndexWriter(store.path / INDEX)
    writer.write(table_of(pd.concat(copies, ignore_index=True)))
    writer.close()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    for key, value in measure()[0].items():
        print(f"{key:24} {value:.4g}")
