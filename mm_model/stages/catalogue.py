"""Stage catalogue: data/patches and data/splits.parquet → data/catalogue."""

from pathlib import Path

from mm_model.catalogue.write import write_catalogue
from mm_model.config import load_params
from mm_model.data.licences import licences
from mm_model.data.store import PatchStore
from mm_model.stages.run import run


def main() -> None:
    params = load_params()
    record = write_catalogue(
        Path("data/catalogue"),
        f"{params.register_.model}-data",
        PatchStore(Path("data/patches")),
        Path("data/splits.parquet"),
        params.selected,
        licences(params.prepare, params.selected, Path.cwd()),
    )
    print(f"{record['description']}\nlook at data/catalogue/index.html (mm show data)")


if __name__ == "__main__":
    run(main)
