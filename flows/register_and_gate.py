"""An evaluated bundle to the champion."""

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact
from prefect.runtime import flow_run

from flows.steps import folder_of, publish
from mm_model.adapters import mlflow_registry, release
from mm_model.adapters.environment import mlflow_url
from mm_model.errors import GateError


# MLflow may be away for a moment, and registering the same bundle twice gives the same version.
@task(retries=2, retry_delay_seconds=10)
def register(pipeline: str) -> release.Candidate:
    return release.register_and_gate(folder_of(pipeline), str(flow_run.get_id() or ""))


@flow(name="register-and-gate", flow_run_name="register-and-gate of {pipeline}")
def register_and_gate(pipeline: str = ".") -> int:
    """Register the bundle, judge it, and make it champion if it passes; returns its version.

    Args:
        pipeline: folder that holds params.yaml, relative to the project.
    """
    candidate = register(pipeline)
    model, version = candidate.model, candidate.version
    verdict = "passed" if candidate.verdict.passed else "failed"
    reasons = "\n".join(f"- {reason}" for reason in candidate.verdict.reasons)
    publish("gate", f"Version {version} of `{model}` {verdict}.\n\n{reasons}")
    create_link_artifact(
        f"{mlflow_url()}/#/models/{model}/versions/{version}",
        f"{model} version {version}",
        key="model-version",
    )
    if not candidate.verdict.passed:
        raise GateError(
            f"version {version} of {model} did not pass its gate",
            got="; ".join(candidate.verdict.reasons),
            remedy="the champion stays; train a better one, or see register.gate in params.yaml",
        )
    mlflow_registry.promote(model, version)
    get_run_logger().info("version %s of %s is champion", version, model)
    return version
