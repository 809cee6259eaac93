"""Stage split: data/patches → data/splits.parquet."""

from pathlib import Path

from mm_model.config import load_params
from mm_model.data.split import make_splits
from mm_model.data.store import PatchStore
from mm_model.stages.run import run


def main() -> None:
    splits = make_splits(PatchStore(Path("data/patches")).index, load_params().split)
    splits.to_parquet("data/splits.parquet", index=False)
    for name, rows in splits.groupby("split"):
        print(f"{name}: {len(rows)} patches of {rows['place_id'].nunique()} places")


if __name__ == "__main__":
    run(main)
