"""What holds for every test: no telemetry, no surprise network or GPU use, no random examples."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

# Before any vendor is imported. A session has a Ray token of its own, so that no test's cluster
# answers to somebody else and none writes ~/.ray/auth_token.
for _key, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "PROJ_NETWORK": "OFF",
    "MPLBACKEND": "Agg",
    # Models this small gain nothing from threads, and lose much where cores are busy.
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_key, _value)

from hypothesis import settings  # noqa: E402  (after the environment)

# The same examples every time, and no timing: the suite runs on busy machines.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def mlflow_is_forgotten() -> Iterator[None]:
    """MLflow writes the server it speaks with into the environment, where others would find it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "")  # so that its absence is what comes back
        patch.delenv("MLFLOW_TRACKING_URI")
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs the internet or a GPU, unless it is asked for or there is one."""
    wants_network = os.environ.get("MM_TEST_NETWORK") == "1"
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for item in items:
        if item.get_closest_marker("network") and not wants_network:
            item.add_marker(pytest.mark.skip(reason="needs the internet: set MM_TEST_NETWORK=1"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
