"""The synthetic Earth's patches, and the store beside the page cache."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import setting
from mm_model.config import Params

PLACES = 8
STORE_PLACES = 16


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Each part in a folder that is gone afterwards."""
    chosen = setting.params()
    with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
        figures = _synthetic(chosen) | _store(chosen, Path(folder))
    return figures, {
        "": f"Patches of {chosen.prepare.patch_px} px with {len(chosen.selected)} modalities.",
        "synthetic_patches_per_s_core": "process bound to one core; median over places",
        "store_random_patches_per_s": "all layers, values and masks, copied out, in random order",
        "store_share_of_page_cache": "time of copying the same mapped bytes, over ours",
    }


def _synthetic(chosen: Params) -> dict[str, float]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        source = setting.synthetic_source(chosen, PLACES + 1)
        rates = []
        for unit in source.units():
            began = time.perf_counter()
            count = sum(1 for _ in source.read(unit))
            rates.append(count / (time.perf_counter() - began))
    finally:
        os.sched_setaffinity(0, allowed)
    return {"synthetic_patches_per_s_core": statistics.median(rates[1:])}


def _store(chosen: Params, folder: Path) -> dict[str, float]:
    store = setting.make_store(chosen, folder / "patches", STORE_PLACES)
    order = np.random.default_rng(0).permutation(len(store)).tolist()
    # Views of the mapped files: no byte of them is read before it is copied.
    views = [[(n, y.values) for n, y in store.read(i).layers.items()] for i in range(len(store))]
    side = chosen.prepare.patch_px
    values = {m.name: np.empty((len(m.bands), side, side), m.dtype) for m in chosen.selected}
    valid = {m.name: np.empty((side, side), np.bool_) for m in chosen.selected}

    def ours() -> None:
        for position in order:
            for name, layer in store.read(position).layers.items():
                np.copyto(values[name], layer.values)
                np.copyto(valid[name], layer.valid)

    def bare() -> None:
        for position in order:
            for name, view in views[position]:
                np.copyto(values[name], view)

    seconds = setting.take_turns({"store": ours, "copy": bare}, repeats=9)
    megabytes = sum(view.nbytes for patch in views for _, view in patch) / 1e6
    return {
        "store_random_patches_per_s": len(store) / statistics.median(seconds["store"]),
        "store_random_mb_per_s": megabytes / statistics.median(seconds["store"]),
        "page_cache_patches_per_s": len(store) / statistics.median(seconds["copy"]),
        "store_share_of_page_cache": setting.ratio(seconds, "copy", "store"),
    }
