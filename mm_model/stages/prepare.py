"""Stage prepare: a source → data/patches."""

from pathlib import Path

from mm_model.adapters.ray_prepare import by_workers
from mm_model.config import load_params
from mm_model.data.prepare import open_source, prepare
from mm_model.stages.run import run


def main() -> None:
    params = load_params()
    source = open_source(params.prepare, params.selected)
    with by_workers(params.prepare.workers) as run_works:
        count = prepare(
            source,
            Path("data/patches"),
            params.selected,
            shard_patches=params.prepare.shard_patches,
            min_valid_fraction=params.prepare.min_valid_fraction,
            alignment=params.prepare.alignment,
            shards=params.prepare.shards,
            run=run_works,
        )
    print(f"{count} patches in data/patches")


if __name__ == "__main__":
    run(main)
