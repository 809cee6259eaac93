"""Stage stats: the training patches → data/stats.json."""

import json
from pathlib import Path

from mm_model.config import load_params
from mm_model.data.files import write_atomically
from mm_model.data.split import TRAIN, load_split
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore
from mm_model.stages.run import run


def main() -> None:
    store = PatchStore(Path("data/patches"))
    positions = load_split(Path("data/splits.parquet"), store.patch_ids)[TRAIN]
    statistics = compute_statistics(store, positions, load_params().selected)
    text = json.dumps(statistics, indent=1, allow_nan=False) + "\n"
    write_atomically(Path("data/stats.json"), text.encode())
    print(f"statistics of {statistics['patches']} patches of {statistics['places']} places")


if __name__ == "__main__":
    run(main)
