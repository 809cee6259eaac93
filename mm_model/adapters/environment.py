"""Where the local services are, and the environment that every process of the platform runs in.

Each address can be set from outside by the variable that its own community uses; the defaults are
the ports that people expect. Telemetry is off everywhere.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mm_model.errors import ConfigError

DEFAULT_PORTS = {
    "mlflow": 5000,
    "prefect": 4200,
    "ray": 6379,
    "ray_dashboard": 8265,
    "ray_client": 10001,
    "endpoint": 8000,
}


def project_root() -> Path:
    """The folder that holds dvc.yaml, params.yaml and var/: MM_PROJECT, or this checkout."""
    return Path(os.environ.get("MM_PROJECT", Path(__file__).resolve().parents[2])).resolve()


def port(service: str) -> int:
    """A service's port: MM_<SERVICE>_PORT, or the default."""
    return int(os.environ.get(f"MM_{service.upper()}_PORT", DEFAULT_PORTS[service]))


def state_dir() -> Path:
    """Everything the local services write: databases, artefacts, logs, the Ray token."""
    return project_root() / "var"


def log_dir() -> Path:
    """Logs of the local services, and of the endpoint's replicas."""
    return state_dir() / "log"


def ray_temp_dir() -> Path:
    """A short path, since Ray puts Unix sockets below it and these may not exceed 107 bytes."""
    digest = hashlib.sha256(str(project_root()).encode()).hexdigest()[:8]
    return Path("/tmp") / f"mm-ray-{digest}"


def mlflow_url() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port('mlflow')}")


def prefect_api_url() -> str:
    return os.environ.get("PREFECT_API_URL", f"http://127.0.0.1:{port('prefect')}/api")


def ray_dashboard_url() -> str:
    return os.environ.get("RAY_DASHBOARD_ADDRESS", f"http://127.0.0.1:{port('ray_dashboard')}")


def ray_address() -> str:
    return os.environ.get("RAY_ADDRESS", f"127.0.0.1:{port('ray')}")


def endpoint_host() -> str:
    """The address that the endpoint listens on: MM_ENDPOINT_HOST, or this machine alone."""
    return os.environ.get("MM_ENDPOINT_HOST", "127.0.0.1")


def endpoint_tls() -> dict[str, str]:
    """Ray Serve's options for MM_ENDPOINT_TLS_CERT and MM_ENDPOINT_TLS_KEY, PEM files; or none."""
    files = {
        "ssl_certfile": os.environ.get("MM_ENDPOINT_TLS_CERT", ""),
        "ssl_keyfile": os.environ.get("MM_ENDPOINT_TLS_KEY", ""),
    }
    if not any(files.values()):
        return {}
    missing = [file or "nothing" for file in files.values() if not Path(file).is_file()]
    if missing:
        raise ConfigError(
            "MM_ENDPOINT_TLS_CERT and MM_ENDPOINT_TLS_KEY",
            got=", ".join(missing),
            allowed="PEM files, both",
        )
    return files


def endpoint_url() -> str:
    """MM_ENDPOINT_URL, or where it listens on this machine: by TLS if it has a certificate."""
    scheme = "https" if endpoint_tls() else "http"
    return os.environ.get("MM_ENDPOINT_URL", f"{scheme}://127.0.0.1:{port('endpoint')}")


def service_environment() -> dict[str, str]:
    """Variables for every process of the platform; what is set outside wins."""
    state = state_dir()
    wanted = {
        "MM_PROJECT": str(project_root()),
        "MLFLOW_TRACKING_URI": mlflow_url(),
        "PREFECT_API_URL": prefect_api_url(),
        "PREFECT_HOME": str(state / "prefect"),
        "RAY_DASHBOARD_ADDRESS": ray_dashboard_url(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(state / "ray_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_MODEL_CATALOG_URI": "",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(state / "dvc"),
        "GX_ANALYTICS_ENABLED": "false",
        "PROJ_NETWORK": "OFF",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mm_model.adapters.ray_proxy:middlewares",
        # A proxy that was killed is missed after three checks: half a minute with Ray's own 10 s.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        # Of each log of Ray, and of each replica's: a file of this size and two old ones.
        "RAY_ROTATION_MAX_BYTES": str(32 * 2**20),
        "RAY_ROTATION_BACKUP_COUNT": "2",
        # Ray would have replicas yield to every other process; what works for hours `give_way`s.
        "RAY_worker_niceness": "0",
        # Threads that wait must not spin: training, evaluation and replicas share the cores.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return {key: os.environ.get(key, value) for key, value in wanted.items()}


def replica_environment() -> dict[str, str]:
    """Those of `service_environment`, and how many compiled kernels a replica keeps.

    torch compiles its kernels for each size of image and batch, and keeps the last 1,024 in two
    places: 250 MB once thirty sizes have been asked for. 256 hold all batches of one size.
    """
    kept = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
    return service_environment() | {k: os.environ.get(k, value) for k, value in kept.items()}


def training_environment() -> dict[str, str]:
    """For workers that train: what a step frees stays with the process, for the next one.

    glibc gives it back and is given it again, page by page: a seventh of a step's time on a CPU.
    """
    kept = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    return {key: os.environ.get(key, value) for key, value in kept.items()}


def jobs_folder(model: str) -> Path:
    """Where the files of a model's jobs lie, and their database if `MM_JOBS_URL` names none."""
    return state_dir() / "jobs" / model


def give_way() -> None:
    """Leave the cores to whoever answers people; for processes that work for hours."""
    os.nice(10)


def enter() -> None:
    """Set the variables of `service_environment` in this process; call before importing vendors."""
    os.environ.update(service_environment())
