"""Stage validate: data/patches and data/splits.parquet → data/validation.json and data/docs."""

from pathlib import Path

import pandas as pd

from mm_model.adapters.environment import enter
from mm_model.config import load_params
from mm_model.data.store import PatchStore
from mm_model.stages.run import run


def main() -> None:
    enter()  # before Great Expectations is imported, so that it sends nothing
    from mm_model.data.validate import validate

    params = load_params()
    count = validate(
        PatchStore(Path("data/patches")).index,
        pd.read_parquet("data/splits.parquet"),
        params.selected,
        patch_px=params.prepare.patch_px,
        min_valid_fraction=params.prepare.min_valid_fraction,
        max_shift_px=params.prepare.alignment.max_shift_px,
        limits=params.validate_,
        report=Path("data/validation.json"),
        docs=Path("data/docs"),
    )
    print(f"{count} expectations met")


if __name__ == "__main__":
    run(main)
