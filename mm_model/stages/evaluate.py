"""Stage evaluate: models/bundle on the held-out patches → reports/."""

from pathlib import Path

from mm_model.bundle import load_bundle
from mm_model.config import load_params
from mm_model.data.split import TEST, load_split
from mm_model.data.store import PatchStore
from mm_model.evaluation.evaluate import evaluate
from mm_model.evaluation.report import write_report
from mm_model.stages.run import run


def main() -> None:
    store = PatchStore(Path("data/patches"))
    positions = load_split(Path("data/splits.parquet"), store.patch_ids)[TEST]
    bundle = load_bundle(Path("models/bundle"))
    evaluation = evaluate(bundle, store, positions, load_params().evaluate)
    write_report(evaluation, Path("reports"))
    figures = {k: v for k, v in evaluation.metrics.items() if k.startswith("mean_")}
    print("  ".join(f"{name} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    run(main)
