"""Stage train: the training patches → models/bundle and models/train.json."""

import json
from pathlib import Path

from mm_model.adapters.train_bundle import train_bundle
from mm_model.config import TrainConfig, load_params
from mm_model.data.files import write_atomically
from mm_model.stages.run import run


def main(add: str | None = None) -> None:
    """Train; `add` is `train.add` of params.yaml, for this run alone."""
    params = load_params()
    if add is not None:
        params = params.model_copy(
            update={"train": TrainConfig(**{**params.train.model_dump(), "add": add})}
        )
    summary = train_bundle(params, Path.cwd())
    text = json.dumps(summary, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(Path("models/train.json"), text.encode())
    print(
        f"{summary['steps']} steps, {summary['samples']} samples at"
        f" {summary['samples_per_s']:.0f} a second; loss {summary['losses']['loss']:.3f}"
    )


if __name__ == "__main__":
    run(main)
