"""What the flows share: a pipeline folder, its DVC stages as a task, pages for the Prefect UI."""

from base64 import b64encode
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.runtime import flow_run, task_run

from mm_model.adapters import dvc
from mm_model.adapters.environment import project_root
from mm_model.errors import ConfigError

DATA_STAGES = ("prepare", "split", "catalogue", "validate", "stats")
MODEL_STAGES = ("train", "evaluate")


def folder_of(pipeline: str) -> Path:
    """The pipeline folder that a flow's parameter names, relative to the project."""
    folder = (project_root() / pipeline).resolve()
    if not (folder / "params.yaml").is_file():
        raise ConfigError("pipeline", got=pipeline, allowed="a folder that holds params.yaml")
    return folder


@task(task_run_name=lambda: f"dvc repro {' '.join(task_run.parameters['stages'])}")
def run_stages(pipeline: str, stages: tuple[str, ...], force: bool) -> None:
    """`dvc repro` of the stages and all they need; no retry, since data do not mend themselves."""
    logger = get_run_logger()
    progress = create_progress_artifact(0.0, key="stages", description=", ".join(stages))
    done = 0

    def on_line(line: str) -> None:
        nonlocal done
        logger.info(line)
        if line.startswith(
            tuple(f"{said} '{s}'" for s in stages for said in ("Stage", "Running stage"))
        ):
            done += 1
            update_progress_artifact(progress, 100.0 * (done - 0.5) / len(stages))

    environment = {"MM_FLOW_RUN_ID": str(flow_run.get_id() or "")}
    dvc.repro(folder_of(pipeline), stages, on_line, force=force, environment=environment)
    update_progress_artifact(progress, 100.0)


def publish(key: str, text: str, pictures: tuple[Path, ...] = ()) -> None:
    """A page in the Prefect UI; pictures lie in the page itself, as it has no files of its own."""
    shown = [
        f"![{p.stem}](data:image/png;base64,{b64encode(p.read_bytes()).decode()})" for p in pictures
    ]
    create_markdown_artifact("\n\n".join([text, *shown]), key=key)
