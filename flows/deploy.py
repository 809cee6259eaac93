"""The champion to the endpoint."""

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_link_artifact

from flows.steps import folder_of
from mm_model.adapters import mlflow_registry, ray_serve, release
from mm_model.adapters.environment import endpoint_url
from mm_model.config import load_params
from mm_model.errors import RegistryError

SERVED_S = 180  # a first replica imports torch and loads the bundle


def url_of(pipeline: str) -> str:
    """Each model has a place of its own below the endpoint."""
    params = load_params(folder_of(pipeline) / "params.yaml")
    return endpoint_url() + params.serve.route_prefix.rstrip("/")


@task(retries=2, retry_delay_seconds=5)
def serve(pipeline: str) -> None:
    params = load_params(folder_of(pipeline) / "params.yaml")
    ray_serve.deploy(params.serve, params.register_.model)


@task
def wait_and_ask(pipeline: str) -> None:
    params = load_params(folder_of(pipeline) / "params.yaml")
    model = params.register_.model
    champion = mlflow_registry.champion(model)
    if champion is None:
        raise RegistryError(f"{model} has no champion", remedy="run register-and-gate first")
    url = url_of(pipeline)
    known = release.wait_until_served(url, model, champion.version, SERVED_S)
    get_run_logger().info("version %s answers", champion.version)
    for name in known:  # by the champion, which may be older than params.yaml
        get_run_logger().info("%s: %s", name, release.ask_endpoint(url, name))


@flow(name="deploy", flow_run_name="deploy of {pipeline}")
def deploy(pipeline: str = ".") -> None:
    """Let the endpoint serve the champion, wait until it does, and ask it once a modality.

    Args:
        pipeline: folder that holds params.yaml, relative to the project.
    """
    serve(pipeline)
    wait_and_ask(pipeline)
    create_link_artifact(f"{url_of(pipeline)}/docs", "The endpoint", key="endpoint")
