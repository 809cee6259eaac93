"""Everything, from rasters to a version that answers over HTTP."""

from prefect import flow

from flows.data_refresh import data_refresh
from flows.deploy import deploy
from flows.register_and_gate import register_and_gate
from flows.train_and_evaluate import train_and_evaluate


@flow(name="release", flow_run_name="release of {pipeline}")
def release(pipeline: str = ".", force: bool = False) -> None:
    """Refresh the data, train, evaluate, register, gate, promote and deploy.

    Args:
        pipeline: folder that holds params.yaml, relative to the project.
        force: run the stages even if nothing changed.
    """
    # Their functions, not runs of their own: `--watch` shows what one run logs, and this is the run
    # that is watched, cancelled and named in a version's lineage.
    data_refresh.fn(pipeline, force)
    train_and_evaluate.fn(pipeline, force)
    register_and_gate.fn(pipeline)
    deploy.fn(pipeline)
