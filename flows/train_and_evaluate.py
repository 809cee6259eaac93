"""Checked patches to an evaluated bundle."""

from prefect import flow

from flows.steps import MODEL_STAGES, folder_of, publish, run_stages


@flow(name="train-and-evaluate", flow_run_name="train-and-evaluate of {pipeline}")
def train_and_evaluate(pipeline: str = ".", force: bool = False) -> None:
    """Train on what `dvc repro` finds changed, and evaluate on held-out places.

    Args:
        pipeline: folder that holds params.yaml, relative to the project.
        force: train and evaluate even if nothing changed.
    """
    run_stages(pipeline, MODEL_STAGES, force)
    reports = folder_of(pipeline) / "reports"
    pictures = tuple(sorted((reports / "sheets").glob("*.png")))
    publish("evaluation", (reports / "table.md").read_text(), pictures)
